"""isolate(): planted causes, identities, controls, refusals; and its result, tables and figures."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from planted import batch, plant
from planted_causes import CAUSES, plant_cause
from pydantic import ValidationError

from melens.batches import Batch
from melens.capture import work_counted
from melens.errors import InterventionError, MelensError, ResultError, SiteError
from melens.figures import draw
from melens.figures.draw import FIGURES
from melens.inputs import prepare
from melens.intervals import mean_interval
from melens.isolating import isolate
from melens.isolating.neurons import direction_of, written_at
from melens.isolating.runs import EditedTexts, Prefixes, RunChange
from melens.locating import locate
from melens.measuring.located import settle
from melens.metrics import next_token_loss, sequence_loss
from melens.models import load
from melens.models.ffn import ffn_of
from melens.results import Isolation
from melens.resume import Resumable
from melens.settings import Run

TICKS = {}
"""What each of them said of its progress."""


@functools.cache
def isolated(cause, seed):
    made = plant_cause(cause, seed)
    model = load(made.model)
    texts = [Batch.of(batch(plant("llama", "single", seed), n=3, length=14, seed=seed))]
    me = locate(model, texts)
    seen = TICKS[cause, seed] = []
    found = isolate(model, me, texts, run=Run(progress=lambda *at: seen.append(at)))
    return made, model, texts, me, found


@pytest.mark.parametrize(("cause", "seed"), [("norm", 0), ("neuron", 1), ("both", 0), ("both", 1)])
def test_what_was_planted_is_blamed(cause, seed):
    made, _, _, me, found = isolated(cause, seed)
    f = found.factorial
    assert (found.layer, found.dim) == (made.truth.me_layer, made.truth.dim)
    assert me.verdict == "single"
    norm_is_cause = abs(f.flat_kept.left) < 0.1
    neurons = {row.neuron for row in found.neurons if row.layer == found.layer}
    one_neuron = found.neurons_for["0.99"] == 1
    assert norm_is_cause == (cause in ("norm", "both"))
    assert one_neuron == (cause in ("neuron", "both"))
    assert neurons & set(made.neurons)
    strongest = max(
        (row for row in found.neurons if row.layer == found.layer), key=lambda row: abs(row.share)
    )
    if cause == "norm":  # each of many does little, all together everything
        assert abs(strongest.left - (1 - 1 / len(made.neurons))) < 0.02
        assert abs(f.kept_edited.left) < 0.2
        assert found.gains.top[0] == made.marker
        assert abs(found.gains.left[made.marker]) < 0.1
    else:
        assert abs(strongest.left) < 0.05
        assert abs(f.kept_edited.left) < 0.05
    if cause == "neuron":
        assert f.flat_kept.left == pytest.approx(1, abs=0.35)


@pytest.mark.parametrize("cause", CAUSES)
def test_the_sums_hold(cause):
    made, _, _, _, found = isolated(cause, 0)
    f = found.factorial
    for row in found.decompositions:
        assert row.error < 1e-4
    cells = [getattr(f, n) for n in ("flat_edited", "flat_kept", "kept_edited", "kept_kept")]
    for name in ("coordinate", "sink_rate", "loss"):
        both, flat, edited, none = (getattr(cell, name) for cell in cells)
        assert getattr(f.interaction, name) == pytest.approx(both - flat - edited + none, abs=1e-5)
    logs = [math.log(abs(cell.coordinate)) for cell in cells]
    assert f.interaction.log_coordinate == pytest.approx(logs[0] - logs[1] - logs[2] + logs[3])
    here = {(w.layer, w.part): w.left for w in found.necessity}
    alone = {(w.layer, w.part): w.left for w in found.sufficiency}
    assert abs(here[made.truth.me_layer, "ffn"]) < 0.05
    assert alone[made.truth.me_layer, "ffn"] == pytest.approx(1, abs=0.05)
    assert all(abs(left) < 0.2 for at, left in alone.items() if at != (made.truth.me_layer, "ffn"))
    assert f.kept_kept.left == 1
    assert f.kept_kept.loss_delta == 0


@pytest.mark.parametrize("cause", CAUSES)
def test_controls_do_nothing_elsewhere(cause):
    made, _, _, _, found = isolated(cause, 0)
    for row in found.controls.layers:
        assert row.layer != made.truth.me_layer
        for cell in (row.flat, row.edited):
            assert cell.left == pytest.approx(1, abs=0.1)
    if cause != "norm":  # there the other neurons of like norm are the writers themselves
        assert all(left == pytest.approx(1, abs=0.02) for left in found.controls.neurons)


def test_losses_and_coordinates_are_those_of_an_edited_copy():
    """Independent: the neurons' columns set to zero in a copy, run as a plain HF model.

    BOS alone is edited by us, all tokens by the copy: the neuron is shut for the others.
    """
    made, _, texts, me, found = isolated("neuron", 0)
    hf = copy.deepcopy(made.model)
    ids = texts[0].ids
    plain = load(hf)
    down = hf.model.layers[found.layer].mlp.down_proj.weight

    def measured():
        with torch.no_grad():
            logits = plain(ids, return_type="logits")
            _, cache = plain.run_with_cache(
                ids, names_filter=[f"blocks.{me.peak_layer}.hook_resid_post"]
            )
        coordinate = cache[f"blocks.{me.peak_layer}.hook_resid_post"][:, 0, found.dim]
        shifted = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )
        return coordinate.mean().item(), shifted.item()

    clean = measured()
    with torch.no_grad():
        down[:, made.neurons] = 0
    edited = measured()
    f = found.factorial
    assert (f.kept_kept.coordinate, f.kept_kept.loss) == pytest.approx(clean, rel=1e-4)
    assert f.kept_edited.coordinate == pytest.approx(edited[0], abs=1e-2)
    assert f.kept_edited.loss == pytest.approx(edited[1], abs=2e-3)


def test_padding_and_batching_change_no_number():
    _, model, texts, me, found = isolated("both", 0)
    ids = texts[0].ids
    rows = [ids[0].tolist(), ids[1].tolist(), ids[2, :9].tolist()]
    apart = isolate(model, me, [Batch.of(torch.tensor([row])) for row in rows])
    for side in ("left", "right"):
        again = isolate(model, me, [Batch.pad(rows, side=side)])
        assert again.coordinate == pytest.approx(found.coordinate, rel=1e-4)
        for one, other in zip(again.rows(), apart.rows(), strict=True):
            for name in ("left", "sink_rate", "loss"):
                assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-3), (side, name)


def test_a_change_after_the_peak_leaves_the_coordinate_and_the_base_its_sinks():
    _, model, texts, me, _ = isolated("neuron", 0)
    inputs = prepare(model, texts)
    located = settle(inputs, me)
    runs = EditedTexts(inputs, located, me.massive[0].dim)
    base, late = RunChange(me.me_layer + 1), RunChange(me.n_layers - 1)
    ((first, second),) = list(runs.outcomes([base, late], lambda done: None))
    torch.testing.assert_close(first.coordinate, second.coordinate)
    torch.testing.assert_close(first.sink_rate, second.sink_rate)
    torch.testing.assert_close(first.loss, second.loss)


def test_the_quadratic_form_finds_a_planted_direction():
    """One neuron whose gate and up read one direction: the form is that direction's square."""
    made, model, _, me, _ = isolated("neuron", 1)
    ffn = ffn_of(model, me.me_layer)
    gate, up = ffn.reads
    neuron = made.neurons[0]
    read = gate[neuron] / gate[neuron].norm()
    x = torch.stack([read * 5, torch.randn(64, generator=torch.Generator().manual_seed(0))])
    found, v = direction_of(ffn, me.massive[0].dim, x[:1], x[1:])
    assert found.kind == "quadratic"
    assert abs(float(v @ read)) > 0.99
    assert found.massive > 0.99
    expected = gate[neuron].norm() * up[neuron].norm() * ffn.down[neuron, me.massive[0].dim]
    assert found.eigenvalue == pytest.approx(expected.item(), rel=0.02)
    assert found.concentration > 0.99


def test_a_plain_ffn_has_a_linear_direction_and_no_gate():
    planted = plant("gpt2", "single", 1)
    texts = [Batch.of(batch(planted, n=2, length=10))]
    found = isolate(planted.model, None, texts)
    assert found.direction.kind == "linear"
    assert found.neurons[0].gate is None
    assert "gate" not in [step.site for step in found.path]


def test_a_norm_after_the_ffn_is_part_of_the_write():
    planted = plant("gemma2", "single", 0)
    texts = [Batch.of(batch(planted, n=2, length=10))]
    found = isolate(planted.model, None, texts)
    assert [row.norm for row in found.norms] == ["ln2", "ln2_post"]
    assert [step.site for step in found.path][-3:] == ["down", "post-norm", "resid_post"]
    assert all(row.error < 1e-4 for row in found.decompositions)
    # the post-norm's gain at the dimension makes it: flat, it is gone; the pre-norm's is innocent
    assert abs(found.norms[1].flat) < 0.3
    assert abs(found.norms[0].flat) > 0.5


@pytest.mark.parametrize("kind", ["pull-back", "cap", "drop"])
def test_other_ffn_edits(kind):
    _, model, texts, me, _ = isolated("neuron", 0)
    found = isolate(model, me, texts, ffn_edit=kind)
    assert abs(found.factorial.kept_edited.left) < 0.1
    assert found.run.settings["ffn_edit"] == kind


def test_another_layer_can_be_asked_for():
    _, model, texts, me, _ = isolated("neuron", 0)
    other = (me.me_layer + 2) % me.n_layers
    found = isolate(model, me, texts, layer=other)
    assert found.layer == other
    assert found.factorial.kept_edited.left == pytest.approx(1, abs=0.1)
    assert any(row.layer == me.me_layer for row in found.controls.layers)


def test_the_model_is_as_it_was_and_an_interrupt_leaves_nothing(monkeypatch):
    _, model, texts, me, _ = isolated("neuron", 0)
    with torch.no_grad():
        clean = model(texts[0].ids, return_type="logits")

    def stop(done, total):
        if done > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        isolate(model, me, texts, run=Run(progress=stop))
    assert all(not point.fwd_hooks for point in model.hook_dict.values())
    with torch.no_grad():
        assert torch.equal(model(texts[0].ids, return_type="logits"), clean)


def test_progress_counts_to_its_total():
    isolated("both", 1)
    seen = TICKS["both", 1]
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len({total for _, total in seen}) == 1


def test_refusals(tiny, ids):
    _, model, texts, me, _ = isolated("neuron", 0)
    words = [Batch.of(texts[0].ids[:, 1:])]
    none = plant("llama", "none", 0)
    cases = [
        (lambda: isolate(model, me, words), ResultError, "no.* massive token"),
        (lambda: isolate(model, me, texts, layer=40), SiteError, "layer 40 is outside"),
        (lambda: isolate(model, me, texts, ffn_edit="top"), InterventionError, "one of neurons"),
        (lambda: isolate(none.model, None, [Batch.of(batch(none))]), ResultError, "no massive"),
        (lambda: isolate(tiny, me, [Batch.of(ids)]), ResultError, "locate it again"),
    ]
    for call, kind, text in cases:
        with pytest.raises(MelensError, match=text) as raised:
            call()
        assert isinstance(raised.value, kind)


def test_the_result_survives_json_and_a_wrong_sum_is_refused():
    *_, found = isolated("both", 0)
    assert Isolation.from_json(found.to_json()) == found
    data = found.to_dict()
    data["factorial"]["interaction"]["loss"] += 1
    with pytest.raises(ValidationError, match="x11 - x10"):
        Isolation.model_validate(data)
    data = found.to_dict()
    data["necessity"][0]["layer"] = 99
    with pytest.raises(ValidationError, match="within 0 and"):
        Isolation.model_validate(data)
    assert len(found.to_frame()) == 4
    assert f"dimension {found.dim}" in found.summary()


@pytest.mark.parametrize("style", list(FIGURES[Isolation]))
def test_every_figure_draws_and_shows_its_numbers(style):
    *_, found = isolated("neuron", 0)
    made = draw(found, style)
    if style == "path":
        assert made.axes[0].lines[0].get_ydata()[0] == pytest.approx(found.path[0].ratio)
    if style == "factorial":
        heights = made.axes[2].lines[0].get_ydata()
        assert heights[2] == pytest.approx(found.factorial.kept_edited.loss_delta)


def test_intervals():
    assert mean_interval(torch.tensor([3.0, 3.0, 3.0])) is None
    assert mean_interval(torch.tensor([3.0])) is None
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    low, high = mean_interval(values)
    half = 1.96 * values.std().item() / 20  # the normal approximation, an independent formula
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    assert low < values.mean().item() < high
    assert mean_interval(values) == (low, high)


def test_next_token_losses_against_cross_entropy_and_padding():
    logits = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 1, 0, 0, 0]])
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    found = next_token_loss(logits, ids, mask)
    for i, length in ((0, 6), (1, 3)):
        expected = torch.nn.functional.cross_entropy(
            logits[i, : length - 1], ids[i, 1:length], reduction="none"
        )
        torch.testing.assert_close(found[i, 1:length], expected)
        assert found[i, 0] == 0
        assert not found[i, length:].any()
        torch.testing.assert_close(sequence_loss(logits, ids, mask)[i], expected.mean())
    left = torch.tensor([[False] * 3 + [True] * 3])
    assert next_token_loss(logits[:1], ids[:1], left).count_nonzero() == 2


def test_contributions_are_what_the_neurons_write():
    made, model, texts, me, _ = isolated("norm", 0)
    inputs = prepare(model, texts)
    prefixes = Prefixes(inputs, settle(inputs, me), me.massive[0].dim)
    found = written_at(model, me.me_layer, prefixes)
    assert set(found.top(0.99)) <= set(made.neurons)
    assert found.summed == pytest.approx(found.made, rel=1e-5)
    assert prefixes.distinct == 1


def test_work_is_counted_in_tokens_through_the_whole_model():
    _, model, texts, _me, _ = isolated("both", 1)
    runner = Resumable(model, texts[0])
    with work_counted(model) as tokens:
        model(texts[0].ids)
        whole = tokens()
        runner.run(1, runner.resid_pre(1))
    assert whole == texts[0].ids.numel()
    assert tokens() == pytest.approx(whole * (2 - 1 / runner.n_layers))
    model(texts[0].ids)
    assert tokens() < 2 * whole  # nothing is counted afterwards


def test_a_share_of_nothing_has_no_sign():
    from melens.results.isolate import _percent

    assert _percent(-1e-6) == "0.0 %"
