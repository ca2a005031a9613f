"""Super weights inside routed experts: the planted one is found, and its cost is the real one."""

from __future__ import annotations

import copy
import json
import statistics

import families
import pytest
import torch

from melens.batches import Batch
from melens.errors import InterventionError, SiteError
from melens.figures.causes import draw_spikes
from melens.interventions.experts import expert_ablate_neuron, expert_prune, expert_zero_weights
from melens.isolating.spikes import DownEntry
from melens.isolating.super_weight_search import Search, super_weights
from melens.isolating.weight_damage import places_of, removed, stand_ins
from melens.models import load
from melens.results.super_weights import SuperWeights

LAYER, DIM = 1, 7
FAMILIES = ["MixtralForCausalLM", "GptOssForCausalLM"]
CLOSE = {"rel": 1e-5, "abs": 1e-6}
"""float32, the same operations; a bridge may add in another order."""


def ids():
    rows = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(5))
    rows[:, 0] = 1
    return rows


def plain_loss(hf, rows):
    """Mean over rows of the mean next-token loss, by the model itself."""
    with torch.no_grad():
        logits = hf(rows, use_cache=False).logits.double()
    each = [
        torch.nn.functional.cross_entropy(x[:-1], y[1:]) for x, y in zip(logits, rows, strict=True)
    ]
    return torch.stack(each).mean().item()


def down_of(hf, expert):
    """(row, column) of one expert's down projection, whichever way it is stored."""
    stored = hf.model.layers[LAYER].mlp.experts.down_proj.data[expert]
    return stored.T if "GptOss" in type(hf).__name__ else stored


def bits(hf):
    """Every stored weight beside a copy of it; a bridge may rename it, and keeps the tensor."""
    return [(stored, stored.detach().clone()) for stored in hf.parameters()]


@pytest.fixture(scope="module", params=FAMILIES)
def planted(request):
    hf = families.tiny(request.param)
    made = families.plant(hf, LAYER, DIM)
    before = bits(hf)
    found = super_weights(load(hf), [Batch.of(ids())])
    return hf, made, before, found


def test_the_planted_entry_of_the_planted_expert_is_found(planted):
    _, made, _, found = planted
    first = found.super_weights[0]
    assert (first.at, first.expert) == ((LAYER, DIM, made.neuron), made.expert)
    assert first.position == 0
    assert first.share == pytest.approx(1.0, abs=0.01)
    assert first.share == pytest.approx(
        first.router_weight * first.input_spike * first.value / first.output_spike, rel=1e-6
    )
    assert found.missing == ()
    assert f"layer {LAYER} expert {made.expert} row {DIM} column {made.neuron}" in found.summary()
    assert found.rows()[0]["expert"] == found.shown()[0]["expert"] == made.expert
    assert "share counts the router's weight" in found.rule
    assert draw_spikes(found)


def test_its_cost_is_that_of_an_entry_zeroed_by_hand(planted):
    hf, made, _, found = planted
    first, base = found.super_weights[0], plain_loss(hf, ids())
    assert found.base_loss == pytest.approx(base, **CLOSE)
    other = copy.deepcopy(hf)
    down_of(other, made.expert)[DIM, made.neuron] = 0.0
    assert first.loss_delta == pytest.approx(plain_loss(other, ids()) - base, **CLOSE)
    down_of(other, made.expert)[:, made.neuron] = 0.0
    assert first.neuron_loss_delta == pytest.approx(plain_loss(other, ids()) - base, **CLOSE)
    other = copy.deepcopy(hf)
    for (_, row, column), expert in zip(found.control.weights, found.control.experts, strict=True):
        down_of(other, expert)[row, column] = 0.0
    assert found.control.loss_delta == pytest.approx(plain_loss(other, ids()) - base, **CLOSE)
    assert found.control.experts == found.together.experts == (made.expert,)


def test_every_bit_is_as_it_was(planted):
    _, _, before, _ = planted
    assert all(torch.equal(stored, kept) for stored, kept in before)


def test_json_goes_there_and_back_and_fits_together(planted):
    _, _, _, found = planted
    assert SuperWeights.from_json(found.to_json()) == found
    data = json.loads(found.to_json())
    assert data["super_weights"][0]["expert"] == data["profile"][LAYER]["expert"] == 0
    short = found.together.model_copy(update={"experts": (0, 1)})
    with pytest.raises(ValueError, match="experts must be said of every weight, or of none"):
        SuperWeights.model_validate({**dict(found), "together": short})


def test_the_profile_is_that_of_a_pass_written_by_hand():
    hf = families.tiny("MixtralForCausalLM")
    families.plant(hf, LAYER, DIM)
    found = super_weights(load(hf), [Batch.of(ids()[:2]), Batch.of(ids()[2:])])
    moe = hf.model.layers[LAYER].mlp
    given = []
    handle = moe.register_forward_hook(lambda m, args, out: given.append((args[0], out)))
    with torch.no_grad():
        hf(ids(), use_cache=False)
    handle.remove()
    (x, out), products = given[0], []
    with torch.no_grad():
        for row in x:
            chosen = (row @ moe.gate.weight.T).softmax(-1).topk(2).indices
            pairs = [(t, e) for t in range(len(row)) for e in chosen[t].tolist()]
            parts = [(row[t] @ moe.experts.gate_up_proj[e].T).chunk(2) for t, e in pairs]
            products.append(
                torch.cat([torch.nn.functional.silu(gate) * up for gate, up in parts]).abs()
            )
    profile = found.profile[LAYER]
    assert profile.input == pytest.approx(max(p.max().item() for p in products), rel=1e-5)
    assert profile.output == pytest.approx(out.abs().max().item(), rel=1e-5)
    medians = [p.median().item() for p in products]
    assert profile.input_median == pytest.approx(statistics.mean(medians), rel=1e-4)
    medians = [o.abs().median().item() for o in out.reshape(x.shape)]
    assert profile.output_median == pytest.approx(statistics.mean(medians), rel=1e-4)


def test_a_second_row_of_the_same_neuron_is_found_in_the_next_pass():
    hf = families.tiny("MixtralForCausalLM")
    made = families.plant(hf, LAYER, DIM)
    down = down_of(hf, made.expert)
    down[9, made.neuron] = down[DIM, made.neuron] / 2
    model = load(hf)
    found = super_weights(model, [Batch.of(ids())])
    places = [(w.at, w.expert, w.found_in) for w in found.super_weights]
    assert places == [
        ((LAYER, DIM, made.neuron), made.expert, 1),
        ((LAYER, 9, made.neuron), made.expert, 2),
    ]
    assert len(super_weights(model, [Batch.of(ids())], search=Search(most=1)).super_weights) == 1


def test_a_second_neuron_of_the_same_row_is_found_in_the_next_pass():
    """The removed one still has the largest product; it must not be taken for the cause again."""
    hf = families.tiny("MixtralForCausalLM")
    made = families.plant(hf, LAYER, DIM)
    experts, inner = hf.model.layers[LAYER].mlp.experts, 48
    reads, down = experts.gate_up_proj.data[made.expert], down_of(hf, made.expert)
    reads[6], reads[6 + inner] = reads[made.neuron], reads[made.neuron + inner]
    down[:, 6] = 0.0
    down[DIM, 6] = 0.8 * down[DIM, made.neuron]
    found = super_weights(load(hf), [Batch.of(ids())]).super_weights
    assert [(w.column, w.found_in) for w in found] == [(made.neuron, 1), (6, 2)]
    assert [w.share for w in found] == pytest.approx([1 / 1.8, 1.0], abs=0.01)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_and_padding_change_nothing(side):
    hf = families.tiny("MixtralForCausalLM")
    made = families.plant(hf, LAYER, DIM)
    rows = [row[:n].tolist() for row, n in zip(ids(), (12, 7, 9, 12), strict=True)]
    model = load(hf)
    alone = super_weights(model, [Batch.of(torch.tensor([row])) for row in rows])
    padded = super_weights(model, Batch.pad(rows, side=side))
    (here,), (there,) = padded.super_weights, alone.super_weights
    assert (here.at, here.expert, here.position) == (there.at, there.expert, 0)
    assert here.expert == made.expert
    assert here.loss_delta == pytest.approx(there.loss_delta, rel=1e-3, abs=1e-5)
    for one, other in zip(padded.profile, alone.profile, strict=True):
        for name in ("input", "input_median", "output", "output_median", "share"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-3), name


def test_controls_are_of_the_same_experts_matrix():
    model = load(families.tiny("MixtralForCausalLM"))
    down = down_of(model.original_model, 2)
    down[4, :] = down[:, 10] = 0.3  # the nearest in size, and not to be taken
    places, _ = places_of(model)
    found = [DownEntry(1, 4, 10, 2), DownEntry(1, 5, 11, 0), DownEntry(1, 6, 12, 2)]
    others = stand_ins(places, found, seed=3)
    assert others == stand_ins(places, found, seed=3) != stand_ins(places, found, seed=4)
    for one, other in zip(found, others, strict=True):
        assert (other.layer, other.expert) == (one.layer, one.expert)
        assert other.row != one.row
        assert other.column != one.column
        down = down_of(model.original_model, one.expert).abs()
        assert down[other.row, other.column] == pytest.approx(
            down[one.row, one.column].item(), abs=0.05
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_edits_are_those_by_hand_and_are_undone_on_errors(name):
    hf = families.tiny(name)
    other, before = copy.deepcopy(hf), bits(hf)
    model, rows = load(hf), ids()
    with torch.no_grad():
        down_of(other, 1)[3, 5] = down_of(other, 1)[4, 6] = 0.0
        pairs = [DownEntry(LAYER, 3, 5, 1), DownEntry(LAYER, 4, 6, 1), DownEntry(LAYER, 3, 5, 1)]
        with removed(model, pairs):
            made = model(rows, return_type="logits")
        torch.testing.assert_close(made, other(rows).logits, rtol=1e-5, atol=1e-6)
        down_of(other, 1)[:, 5] = 0.0
        with removed(model, pairs), expert_ablate_neuron(model, LAYER, 1, neuron=5):
            made = model(rows, return_type="logits")
        torch.testing.assert_close(made, other(rows).logits, rtol=1e-5, atol=1e-6)
        down_of(other, 1)[:] = 0.0
        bias = getattr(other.model.layers[LAYER].mlp.experts, "down_proj_bias", None)
        if bias is not None:
            bias[1] = 0.0
        with expert_prune(model, LAYER, 1):
            made = model(rows, return_type="logits")
        torch.testing.assert_close(made, other(rows).logits, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(stored, kept) for stored, kept in before)
    with pytest.raises(RuntimeError, match="on purpose"), expert_prune(model, LAYER, 1):
        fail()
    assert all(torch.equal(stored, kept) for stored, kept in before)


def fail():
    raise RuntimeError("on purpose")


def test_what_cannot_be_meant_is_refused(tiny):
    model = load(families.tiny("MixtralForCausalLM"))
    with (
        pytest.raises(InterventionError, match="expert must be at least one of layer 1's experts"),
        expert_prune(model, LAYER, 9),
    ):
        pass
    with (
        pytest.raises(InterventionError, match="rows must be at least one of d_model 0 to 31"),
        expert_zero_weights(model, LAYER, 0, weights=[(32, 0)]),
    ):
        pass
    with (
        pytest.raises(InterventionError, match="neuron must be at least one of expert 0's neurons"),
        expert_ablate_neuron(model, LAYER, 0, neuron=48),
    ):
        pass
    with pytest.raises(SiteError, match="block 1 has no routed experts"), expert_prune(tiny, 1, 0):
        pass


def test_experts_that_do_more_than_their_weights_say_are_not_looked_at():
    model = load(families.tiny("MixtralForCausalLM"))
    module = places_of(model)[0][LAYER].experts.module
    handle = module.register_forward_hook(lambda module, args, out: out * 1.1)
    found = super_weights(model, [Batch.of(ids())])
    handle.remove()
    assert [row.layer for row in found.profile] == [0, 2]
    assert "layer 1: block 1's experts cannot be told apart" in found.missing[0]
