"""What an evaluation must not say: flips that prove nothing, items without the token."""

from __future__ import annotations

from math import comb

import families
import pytest
import torch
from planted import batch, plant
from words import tokenizer

from melens.batches import Batch
from melens.errors import InterventionError, MetricError, ResultError
from melens.evaluating.edits import (
    BASE,
    EditCondition,
    check_held,
    check_unedited,
    conditions,
    first_layer,
)
from melens.evaluating.forced import AT_ONCE, Forced, Foreseen, ItemOutcome, Runner
from melens.evaluating.run import _row
from melens.evaluating.tasks import ForcedTask, token_loss
from melens.intervals import paired_difference
from melens.interventions import norm_flatten, wemask
from melens.locating import locate
from melens.models import load
from melens.results.edit import Edit
from melens.settings import Compare
from melens.tuning import tune


@pytest.fixture(scope="module")
def made():
    """A planted model, and what is located in it."""
    planted = plant("llama", "single", 1)
    model = load(planted.model)
    texts = batch(planted, n=6, length=20)
    return model, locate(model, [Batch.of(texts)]), texts


def items_of(texts, *, first=None):
    rows = texts.tolist()
    for row in rows:
        row[0] = row[0] if first is None else first
    scored = (False, *[True] * (len(rows[0]) - 1))
    return [Forced(str(i), tuple(row), scored, {}) for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("up", "down"),
    [(1, 0), (3, 0), (5, 0), (6, 0), (0, 6), (7, 1), (8, 1), (9, 3), (2, 2), (12, 2)],
)
@pytest.mark.parametrize("items", [20, 60])
def test_flips_are_told_apart_exactly_where_the_sign_test_does(up, down, items):
    apart = torch.tensor([1.0] * up + [-1.0] * down + [0.0] * (items - up - down)).double()
    found = paired_difference(apart, torch.zeros(items).double(), torch.ones(items).double())
    flips, most = up + down, max(up, down)
    p = min(1.0, 2 * sum(comb(flips, k) for k in range(most, flips + 1)) / 2**flips)
    low, high = found.interval
    assert (low > 0 or high < 0) == (p < 0.05)
    assert low <= found.value == (up - down) / items <= high


def test_a_null_of_rare_flips_is_rarely_called_an_effect():
    """Flips to either side with equal chance: the bootstrap alone errs far above its 5 %."""
    rng = torch.Generator().manual_seed(0)
    wrong, tries = 0, 400
    for _ in range(tries):
        draw = torch.rand(40, generator=rng)
        apart = (draw < 0.06).double() - (draw > 0.94).double()
        interval = paired_difference(apart, torch.zeros(40), torch.ones(40)).interval
        wrong += interval is not None and (interval[0] > 0 or interval[1] < 0)
    assert wrong / tries < 0.05


@pytest.mark.parametrize("tokens", [20, 60, 1024])
def test_items_without_the_token_stay_as_they_are_whatever_the_batches(made, tokens):
    model, me, texts = made
    plain = next(i for i in range(3, 60) if i != int(texts[0, 0]))
    first_only = me.model_copy(
        update={
            "massive": tuple(t for t in me.massive if t.position == 0),
            "stability": me.stability.model_copy(update={"first_tokens": ()}),
        }
    )
    items = [*items_of(texts)[:3], *items_of(texts, first=plain)[3:]]
    items = [Forced(f"{i}", one.ids, one.scored, {}) for i, one in enumerate(items)]
    edit = Edit(select="activation", rate=0.5)
    tried = (EditCondition("base", "base", BASE), EditCondition("edited", "edited", edit))
    found = {"base": {}, "edited": {}}
    for outcome in Runner(model, tried, first_only, batch_tokens=tokens).run(items):
        for name, kept in outcome.found.items():
            found[name] |= {i.id: f.loss for i, f in zip(outcome.items, kept, strict=True)}
    for i in range(6):
        same = torch.allclose(found["base"][str(i)], found["edited"][str(i)], atol=1e-6)
        assert same == (i >= 3)
    check_held(model, first_only, [item.ids for item in items])
    with pytest.raises(InterventionError, match=r"no token of the 3 items is massive"):
        check_held(model, first_only, [item.ids for item in items[3:]])


def test_logits_in_pieces_are_those_of_the_whole(made, monkeypatch):
    model, me, texts = made
    tried = (EditCondition("base", "base", BASE), EditCondition("edited", "edited", Edit()))
    assert AT_ONCE >= 19
    whole = next(Runner(model, tried, me).run(items_of(texts)))
    monkeypatch.setattr("melens.evaluating.forced.AT_ONCE", 4)
    pieces = next(Runner(model, tried, me).run(items_of(texts)))
    for name in whole.found:
        for one, other in zip(whole.found[name], pieces.found[name], strict=True):
            torch.testing.assert_close(one.loss, other.loss)
            torch.testing.assert_close(one.kl, other.kl)


@pytest.mark.parametrize("make", [lambda m: wemask(m, 0, rate=0.5), lambda m: norm_flatten(m, 1)])
def test_a_base_under_an_open_edit_is_refused(made, make):
    model, *_ = made
    with (
        pytest.raises(InterventionError, match=r"an edit is open on this model"),
        make(model),
    ):
        check_unedited(model)
    check_unedited(model)


def test_a_loss_that_is_no_number_is_one_line():
    item = Forced("7", (1, 2), (False, True), {})
    nan = torch.tensor([float("nan")])
    bad = Foreseen(loss=nan, right=nan > 0, kl=nan, agree=nan > 0)
    task = ForcedTask("t", "nats a token", False, "", (item,), token_loss)
    with pytest.raises(MetricError, match=r"item 7 under base .* of nan; load the model in"):
        _row(task, ItemOutcome(item, "base", bad, bad, None, None))


def test_edits_of_the_me_layer_need_one(made):
    model, me, _ = made
    for nothing in (None, me.model_copy(update={"me_layer": None})):
        with pytest.raises(InterventionError, match=r"zero acts at the ME Layer"):
            first_layer(model, Edit(name="zero"), nothing)
    assert first_layer(model, Edit(name="zero", layers=(1,)), None) == 1


def test_other_layers_are_as_many_as_the_edit_has(made):
    model, me, _ = made
    n = model.cfg.n_layers
    for layers in ((n - 1,), (n - 2, n - 1), tuple(range(n // 2, n))):
        control = next(
            c.edit.layers
            for c in conditions(model, Edit(layers=layers), me, Compare(rates=(), seeds=()))
            if c.name == "other layers"
        )
        assert len(control) == min(len(layers), layers[0])
        assert not set(control) & set(layers)


def test_tune_refuses_a_layer_of_another_model(made):
    model, me, _ = made
    other = me.model_copy(update={"run": me.run.model_copy(update={"weights": "0" * 16})})
    with pytest.raises(ResultError):
        tune(model, me_layer=other)


@pytest.mark.parametrize("name", ["MiniCPM3ForCausalLM", "Gemma4ForCausalLM", "xLSTMForCausalLM"])
def test_later_batches_run_as_the_first_was_found_to(name):
    """Models whose head is more than a norm and a matrix: every batch is a plain pass's."""
    hf = families.tiny(name)
    model, rng = load(hf, tokenizer=tokenizer()), torch.Generator().manual_seed(0)
    ids = [[1, *torch.randint(3, 60, (n,), generator=rng).tolist()] for n in (15, 11, 7)]
    items = [
        Forced(str(i), tuple(row), (False, *[True] * (len(row) - 1)), {})
        for i, row in enumerate(ids)
    ]
    base = EditCondition("base", "base", BASE)
    runner = Runner(model, (base,), None, batch_tokens=8)  # one item a batch
    found = {one.item.id: one.plain.loss for out in runner.run(items) for one in out.each()}
    for item in items:
        row = torch.tensor([item.ids])
        with torch.no_grad():
            logits = hf(row, use_cache=False).logits[0, :-1].float()
        plain = torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none")
        torch.testing.assert_close(found[item.id], plain, rtol=1e-4, atol=1e-4)
