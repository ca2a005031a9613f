"""A model under number formats: against a model written out by hand, and by its invariants."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from melens import locate
from melens.batches import Batch
from melens.errors import (
    CaptureError,
    InterventionError,
    ModelError,
    PromptError,
    ResultError,
    UnknownNameError,
)
from melens.models import load
from melens.quantising import SCHEMES, Protect, quantise
from melens.quantising.layers import plain_model
from melens.quantising.running import KeptWhole, QuantisedModel, unquantised
from melens.results.evaluation import Delta
from melens.settings import Run

PROTECT = Protect(seeds=(0,), prefix=0, first=2)


@pytest.fixture(scope="module")
def planted():
    from planted import batch, plant

    made = plant("llama", "single", 0)
    model = load(made.model)
    texts = batch(made, n=24, length=24)
    return made.model, model, texts, locate(model, texts)


@pytest.fixture(scope="module")
def result(planted):
    _, model, texts, located = planted
    schemes = ["w8a8-tensor", "w8a8-static", "w4a16", "kv4-token"]
    before = [p.clone() for p in model.parameters()]
    made = quantise(model, texts, schemes=schemes, me_layer=located, protect=PROTECT)
    assert all(map(torch.equal, before, model.parameters()))
    return made


def trial(result, scheme, name, **given):
    (found,) = (
        t
        for t in result.scheme(scheme).trials
        if t.name == name and all(getattr(t, k) == v for k, v in given.items())
    )
    return found


class RoundedLinear(nn.Module):
    """int8 by hand: a step for each row of weights, and one for what shares it among inputs.

    In float32: the largest entry lies between two steps, and rounding decides which.
    """

    def __init__(self, linear, over):
        super().__init__()
        w = linear.weight.detach()
        self.weight, self.bias, self.over = self.grid(w, (-1,)), linear.bias, over

    @staticmethod
    def grid(x, over):
        step = x.abs().amax(over, keepdim=True).clamp_min(1e-30) / 127.5
        return (x / step).round().clamp(-128, 127) * step

    def forward(self, x):
        return nn.functional.linear(self.grid(x, self.over), self.weight, self.bias)


@pytest.mark.parametrize(("scheme", "over"), [("w8a8-tensor", (-2, -1)), ("w8a8-token", (-1,))])
def test_logits_are_those_of_a_model_whose_layers_were_written_by_hand(planted, scheme, over):
    _, model, texts, _ = planted
    by_hand = plain_model(model).hf
    for block in by_hand.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, RoundedLinear(linear, over))
    batch = Batch.of(texts[:3])
    with torch.no_grad():
        expected = by_hand(batch.ids, use_cache=False).logits
    found = QuantisedModel.of(plain_model(model), SCHEMES[scheme]).logits(batch, KeptWhole())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - unquantised(plain_model(model), batch)).abs().max() > 1e-2


def test_what_one_text_costs_does_not_depend_on_the_others_or_on_padding(planted):
    _, model, texts, _ = planted
    plain = plain_model(model)
    rows = [texts[0].tolist(), texts[1, :17].tolist()]
    for name in ("w8a8-tensor", "w8a8-token", "kv8-channel", "kv4-token"):
        quantised = QuantisedModel.of(plain, SCHEMES[name])
        both = quantised.logits(Batch.pad(rows), KeptWhole())
        alone = quantised.logits(Batch.pad(rows[1:]), KeptWhole())
        torch.testing.assert_close(both[1, :17], alone[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["w8a8-tensor", "w8a8-token", "w8a8-static"])
def test_padding_and_what_is_kept_whole_widen_no_scale(planted, name):
    from melens.quantising.running import _Pass

    quantised = QuantisedModel.of(plain_model(planted[1]), SCHEMES[name])
    grid, batch = SCHEMES[name].inputs, Batch.pad([[5, 6, 7, 8], [5, 6]])
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    kept = torch.zeros_like(batch.mask)
    kept[0, 1] = True
    loud = x.clone()
    loud[1, 2:], loud[0, 1] = 1e4, 1e4  # padding, and a token that is kept whole
    how = KeptWhole(kept, largest={"there": 4.0})
    found, plain = (_Pass(quantised, batch, how)._read("there", y, grid) for y in (loud, x))
    seen = batch.mask & ~kept
    assert torch.equal(found[seen], plain[seen])
    assert torch.equal(found[0, 1], loud[0, 1])
    assert not torch.equal(found[seen], x[seen])


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_what_is_kept_whole_is_the_model_as_it_is(planted, scheme):
    _, model, texts, _ = planted
    plain, batch = plain_model(model), Batch.of(texts[:2])
    quantised = QuantisedModel.of(plain, SCHEMES[scheme])
    largest = {one.path: 1.0 for one in plain.weights}
    rounded = quantised.logits(batch, KeptWhole(largest=largest))
    whole = unquantised(plain, batch)
    assert not torch.equal(rounded, whole)
    every = frozenset(one.path for one in plain.weights)
    kept = KeptWhole(torch.ones_like(batch.mask), modules=every, largest=largest)
    if SCHEMES[scheme].cache is not None:
        assert torch.allclose(quantised.logits(batch, kept), whole, atol=1e-5)
    else:
        with pytest.raises(CaptureError, match="rounded nothing"):
            quantised.logits(batch, kept)
        entries = {
            one.name: tuple(map(tuple, torch.ones(one.matrix.shape).nonzero().tolist()))
            for one in plain.weights[:2]
        }
        one = KeptWhole(kept.tokens, entries, every - {w.path for w in plain.weights[:2]}, largest)
        assert torch.allclose(quantised.logits(batch, one), whole, atol=1e-5)


def test_the_massive_token_makes_the_damage_and_random_ones_do_not(result):
    for scheme in ("w8a8-tensor", "w8a8-static"):
        kept = trial(result, scheme, "massive-token")
        random = trial(result, scheme, "random-tokens", control_of="massive-token")
        assert kept.tokens == random.tokens == result.massive_tokens
        # of a random model on random tokens KL is damage, and loss is not
        whole = result.scheme(scheme).as_is.kl
        assert kept.kl.interval[1] < 0.5 * whole.interval[0]
        assert abs(random.kl.value / whole.value - 1) < 0.2


def test_numbers_fit_together(result):
    assert result.calibration_texts == 6
    assert result.texts == 18
    for found in result.schemes:
        assert found.unrounded == ()
        assert found.passes <= 20
        for one in found.trials:
            assert one.loss.value - result.base_loss.value == pytest.approx(
                one.damage.value, abs=1e-9
            )
            assert one.kl.value >= -1e-9
            if one.bought is not None:
                apart = found.as_is.damage.value - one.damage.value
                assert one.bought.value == pytest.approx(apart, abs=1e-9)
    assert 4 + 16 / 128 < trial(result, "w4a16", "as is").bits < 4 + 16 / 32
    assert trial(result, "kv4-token", "as is").bits is None


def test_a_run_that_was_stopped_goes_on_and_ends_alike(planted, tmp_path):
    _, model, texts, located = planted
    rows = tmp_path / "rows.jsonl"
    how = {"schemes": ["w8a8-token"], "me_layer": located, "protect": PROTECT}
    whole = quantise(model, texts[:8], **how, run=Run(keep=rows))

    class StoppedError(Exception):
        pass

    def stop(done, total):
        if done * 2 >= total:
            raise StoppedError

    torn = tmp_path / "torn.jsonl"
    with pytest.raises(StoppedError):
        quantise(model, texts[:8], **how, run=Run(keep=torn, progress=stop))
    assert 1 < len(torn.read_text().splitlines()) < len(rows.read_text().splitlines())
    again = quantise(model, texts[:8], **how, run=Run(keep=torn))
    assert again.schemes == whole.schemes
    with pytest.raises(ResultError, match="another quantisation"):
        quantise(model, texts[1:9], **how, run=Run(keep=torn))


def test_without_a_massive_token_the_rest_is_still_measured(tiny, ids):
    found = quantise(tiny, ids, schemes=["w8a8-tensor"], protect=PROTECT)
    assert found.massive_tokens == 0
    assert [t.name for t in found.schemes[0].trials] == ["as is"]
    assert "massive-token" in found.left_out[0]


def test_behind_a_prefix_keys_and_values_of_the_model_as_it_is_are_read(planted):
    _, model, texts, _ = planted
    plain, batch, start = plain_model(model), Batch.of(texts[:2]), 5
    by_hand = plain_model(model).hf
    for block in by_hand.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, RoundedLinear(linear, (-1,)))
    with torch.no_grad():
        before = plain.hf(batch.ids[:, :start], use_cache=True)
        expected = by_hand(batch.ids[:, start:], past_key_values=before.past_key_values).logits
    quantised = QuantisedModel.of(plain, SCHEMES["w8a8-token"])
    found = quantised.logits(batch, KeptWhole(prefix=start))
    assert torch.equal(found[:, :start], before.logits)
    torch.testing.assert_close(found[:, start:], expected, rtol=1e-4, atol=1e-4)


def test_a_prefix_is_searched_where_texts_begin_with_different_tokens(planted):
    from planted import newline_batch, plant_newline

    model = load(plant_newline().model)
    texts = newline_batch(seed=1)
    found = quantise(model, texts, schemes=["w8a8-tensor"], protect=Protect(seeds=(0,)))
    assert found.prefix
    one = trial(found, "w8a8-tensor", "prefix")
    assert one.tokens == len(found.prefix) * found.texts
    _, model, texts, located = planted
    same = quantise(model, texts[:4], schemes=["kv4-token"], me_layer=located)
    assert same.prefix == (int(texts[0, 0]),)  # what all begin with, and nothing else is massive


def test_refusals(planted):
    _, model, texts, located = planted
    with pytest.raises(InterventionError, match="list of names"):
        quantise(model, texts, schemes="w4a16")
    with pytest.raises(UnknownNameError, match=r"unknown scheme 'w4a6'\. Did you mean 'w4a"):
        quantise(model, texts, schemes=["w4a6"])
    with pytest.raises(PromptError, match=r"two different texts"):
        quantise(model, texts[:1], schemes=["w8a8-static"], me_layer=located)
    with pytest.raises(InterventionError, match="first must be"):
        Protect(first=0)
    with pytest.raises(InterventionError, match="at most 2 seeds"):
        Protect(seeds=(0, 1, 2))


def test_a_token_of_the_cache_that_is_kept_whole_widens_no_scale():
    from melens.quantising.running import _rounded_heads

    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    real = Batch.pad([[5] * 5, [5] * 3]).mask
    kept = torch.zeros_like(real)
    kept[:, 0] = True
    loud = x.clone()
    loud[:, :, 0], loud[1, :, 3:] = 1e4, 1e4
    for name in ("kv4-channel", "kv4-token", "kv-fp8"):
        grid = SCHEMES[name].cache
        found, plain = (_rounded_heads(y, grid, kept, real) for y in (loud, x))
        seen = (real & ~kept)[:, None, :, None].expand_as(x)
        assert torch.equal(found[seen], plain[seen])
        assert torch.equal(found[:, :, 0], loud[:, :, 0])


def test_weights_are_put_back_whatever_happens(planted, monkeypatch):
    from melens.quantising import running

    plain, batch = plain_model(planted[1]), Batch.of(planted[2][:2])
    quantised = QuantisedModel.of(plain, SCHEMES["w8a8-token"])
    before, calls = unquantised(plain, batch), []

    def breaks(*given):
        calls.append(given)
        if len(calls) == 9:
            raise MemoryError
        return rounded(*given)

    rounded = running.rounded
    monkeypatch.setattr(running, "rounded", breaks)
    with pytest.raises(MemoryError):
        quantised.logits(batch, KeptWhole())
    assert torch.equal(unquantised(plain, batch), before)


def test_controls_are_drawn_anew_for_every_seed_and_batch_among_ordinary_tokens(planted):
    from melens.quantising.trials import MarkedTexts, TrialPlan

    _, model, texts, located = planted
    marked = MarkedTexts.of(model, texts[:8].tolist(), located, batch_size=4)
    drawn = {
        (seed, at): marked.kept(
            TrialPlan("random-tokens", "control", "massive-token", seed), at, first=1
        )
        for seed in (0, 1)
        for at in (0, 1)
    }
    for (_, at), mask in drawn.items():
        assert torch.equal(mask.sum(-1), marked.massive[at].sum(-1))
        assert not (mask & marked.massive[at]).any()
    assert len({tuple(mask.flatten().tolist()) for mask in drawn.values()}) == 4


def test_scores_by_hand():
    """Two positions that foresee a token; KL from the model as it is to the rounded one."""
    from melens.quantising.run import _scored

    p = torch.tensor([[0.5, 0.25, 0.25], [0.7, 0.2, 0.1], [1 / 3] * 3]).log()[None]
    q = torch.tensor([[0.25, 0.5, 0.25], [0.6, 0.2, 0.2], [1 / 3] * 3]).log()[None]
    batch = Batch.of(torch.tensor([[0, 1, 0]]))
    (row,) = _scored(["7"], "x", p + 3.0, q - 2.0, batch, 0, 5)
    assert row.value == pytest.approx(-(math.log(0.5) + math.log(0.6)) / 2)
    assert row.weight == 2
    assert row.also["base"][0] == pytest.approx(-(math.log(0.25) + math.log(0.7)) / 2)
    first = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    second = 0.7 * math.log(0.7 / 0.6) + 0.1 * math.log(0.5)
    assert row.also["kl"][0] == pytest.approx((first + second) / 2)
    assert row.also["agreement"][0] == 0.5
    (row,) = _scored(["7"], "x", p, q, batch, 1, 5)  # behind a prefix of one token
    assert row.weight == 1
    assert row.value == pytest.approx(-math.log(0.6))


WALK = {
    "GPT2LMHeadModel": (12, 0),
    "MixtralForCausalLM": (None, 0),
    "DeepseekV3ForCausalLM": (None, 0),
    "Qwen3NextForCausalLM": (None, 0),
    "Zamba2ForCausalLM": (None, None),
    "JetMoeForCausalLM": (None, 12),
    "Llama4ForCausalLM": (None, 3),
}
"""Tiny models of other kinds: weights that are rounded, and modules that are said to be left; None
= at least one of them, where transformers decides how many."""


@pytest.mark.parametrize("family", WALK)
def test_every_matrix_is_rounded_or_said_to_be_left(family):
    import families

    hf = families.tiny(family)
    plain = plain_model(load(hf))
    rounded, left = WALK[family]
    assert rounded is None or len(plain.weights) == rounded
    assert left is None or len(plain.missed) == left, plain.missed
    known = {one.name for one in plain.weights}
    for name, value in plain.hf.named_parameters():
        owner, _, last = name.rpartition(".")
        matrix = value.squeeze().ndim > 1 and last in ("weight", "gate_up_proj")
        matrix = matrix and "conv" not in name and "layers" in name
        if matrix and "router" not in name and not owner.endswith("gate"):
            assert name in known or owner in plain.missed, name
    batch = Batch.of(torch.randint(5, 40, (2, 12), generator=torch.Generator().manual_seed(0)))
    whole = unquantised(plain, batch)
    for scheme in ("w8a8-tensor", "w8a8-token"):
        found = QuantisedModel.of(plain, SCHEMES[scheme]).logits(batch, KeptWhole())
        assert torch.isfinite(found).all()
        apart = float((found - whole).abs().max() / whole.abs().max())
        assert 0 < apart < 1


def test_in_sixteen_bits_the_same_is_rounded(planted):
    _, model, texts, _ = planted
    plain, batch = plain_model(model), Batch.of(texts[:2])
    half = plain_model(load(copy.deepcopy(planted[0]).to(torch.bfloat16)))
    for name in ("w8a8-tensor", "w4a16", "kv4-token"):
        wide, narrow = (
            QuantisedModel.of(one, SCHEMES[name]).logits(batch, KeptWhole()).float().log_softmax(-1)
            for one in (plain, half)
        )
        base = unquantised(half, batch).float().log_softmax(-1)
        assert (narrow - base).abs().mean() > 0
        assert (narrow - wide).abs().mean() < 0.2


def test_a_weight_that_is_kept_whole_widens_no_scale(planted):
    plain, batch = plain_model(planted[1]), Batch.of(planted[2][:2])
    one = next(w for w in plain.weights if "down_proj" in w.name)
    quantised = QuantisedModel.of(plain, SCHEMES["w4a16"])
    at = divmod(int(one.matrix.abs().argmax()), one.matrix.shape[1])
    from melens.quantising.running import _Pass

    kept = _Pass(quantised, batch, KeptWhole(entries={one.name: (at,)}))._dense(one)
    plainly = quantised.packed[one.name].dense(torch.float32)
    assert kept[at] == one.matrix[at]
    row = slice(at[0], at[0] + 1)
    errors = [(x[row] - one.matrix[row]).abs().sum() for x in (kept, plainly)]
    assert errors[0] < errors[1]


def test_controls_keep_as_many_and_what_has_too_few_is_left_out(result, planted):
    for found in result.schemes:
        for one in found.trials:
            for control in (t for t in found.trials if t.control_of == one.name):
                assert (control.tokens, len(control.weights)) == (one.tokens, len(one.weights))
                assert len(control.modules) == len(one.modules)
    _, model, texts, located = planted
    short = quantise(model, texts[:, :4], schemes=["kv4-token"], me_layer=located)
    assert any(said.startswith("first-tokens: some text has too few") for said in short.left_out)
    assert "first-tokens" not in {t.name for t in short.schemes[0].trials}


def test_what_is_said_depends_on_what_was_compared(result):
    found = result.scheme("w8a8-tensor")

    def said(**change):
        trials = [t if t.role != "protected" else t.model_copy(update=change) for t in found.trials]
        return found.model_copy(update={"trials": tuple(trials)}).said()

    none = {"beyond_random": None, "kl_beyond_random": None}
    assert said(**none).endswith(").")  # no control was run: nothing is said of what helps
    few = Delta(value=0.1, interval=None)
    assert "so few texts" in said(beyond_random=few, kl_beyond_random=few)
    zero, more = Delta(value=0.0, interval=(-0.1, 0.1)), Delta(value=0.3, interval=(0.2, 0.4))
    assert "nothing that was kept whole helps" in said(beyond_random=zero, kl_beyond_random=zero)
    assert "in KL alone" in said(beyond_random=zero, kl_beyond_random=more)
    assert "massive-token" in said(beyond_random=more, kl_beyond_random=zero)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_are_refused(planted):
    from peft import LoraConfig, get_peft_model

    hf = get_peft_model(copy.deepcopy(planted[0]), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="merge them first"):
        quantise(hf, planted[2][:2], schemes=["w8a16"])


def test_a_scheme_more_runs_only_what_is_new_and_equal_texts_count_once(planted, tmp_path):
    _, model, texts, located = planted
    twice, keep = torch.cat([texts[:4], texts[:2]]), tmp_path / "rows.jsonl"
    how = {"me_layer": located, "protect": PROTECT, "run": Run(keep=keep)}
    first = quantise(model, twice, schemes=["w8a8-token"], **how)
    assert first.texts == 4
    before = keep.read_text()
    both = quantise(model, twice, schemes=["kv4-token", "w8a8-token"], **how)
    added = keep.read_text().removeprefix(before)
    assert added.startswith('{"item"')
    assert "w8a8-token" not in added
    assert [t.loss for t in both.scheme("w8a8-token").trials] == [
        t.loss for t in first.schemes[0].trials
    ]
