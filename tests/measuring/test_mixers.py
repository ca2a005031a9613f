"""Kinds of mixers, a hybrid's rhythm, output gates, recurrent states, learned sinks."""

from __future__ import annotations

import math
import random

import families
import pytest
import torch
from transformers import DynamicCache

from melens.batches import Batch
from melens.locating.trajectory import Path
from melens.measuring import attention, mixers
from melens.measuring.gates import gates
from melens.measuring.states import follow
from melens.measuring.token_mixers import _shares, kinds_of, mixer_parts
from melens.metrics.hybrid import (
    inter_spike_retention,
    shifted_places,
    sink_spike_alignment,
)
from melens.models import load
from melens.models.anatomy import anatomy
from melens.results import Mixers

FULL, LINEAR, STATE = "full attention", "linear attention", "state space"


def ids(length=20):
    rows = torch.randint(3, 64, (3, length), generator=torch.Generator().manual_seed(1))
    rows[:, 0] = 1
    return rows


def test_the_rhythm_in_closed_form():
    norms = [1, 9, 2, 4, 8, 3, 5, 2]
    # before 2: layers 0 and 1, the largest at 1; before 5: 3 and 4, at 4; before 7: 6, left out
    assert sink_spike_alignment(norms, {2, 5, 7}) == 1.0
    # before 3: layers 0 to 2, the largest at 1; before 6: 4 and 5, the largest at 4
    assert sink_spike_alignment(norms, {3, 6}) == 0.0
    assert sink_spike_alignment(norms, {0, 1}) is None
    # before 3 the largest is at 1; before 6, of 4 and 5, at 4; before 9, of 7 and 8, at 8
    assert sink_spike_alignment([*norms, 6, 1], {3, 6, 9}) == pytest.approx(1 / 3)
    assert sink_spike_alignment(norms, {1, 3, 5, 7}) is None  # one layer is the largest of one
    # peaks at 1 and 4; between them, without full attention, layer 3: 4 of the smaller peak, 8
    assert inter_spike_retention(norms, {2, 5}) == pytest.approx(4 / 8)
    assert inter_spike_retention(norms, {2}) is None
    assert inter_spike_retention([3, 2, 7, 4], {1, 4}) == 1.0  # capped: a bump is no loss


def test_growth_alone_is_as_aligned_at_other_places():
    grown = list(range(1, 13))
    control = shifted_places(sink_spike_alignment, grown, {3, 7, 11})
    assert (control.mean, control.low, control.shifts) == (1.0, 1.0, 3)
    spiky = [9 if layer % 4 == 2 else 1 + layer / 100 for layer in range(12)]
    assert sink_spike_alignment(spiky, {3, 7, 11}) == 1.0
    # one layer earlier there is no spike between, and what is left grows; else the spike is first
    assert shifted_places(sink_spike_alignment, spiky, {3, 7, 11}).mean == pytest.approx(1 / 3)


def test_on_norms_without_a_rhythm_value_and_control_agree():
    """One of three layers is the largest in a third of all draws, wherever the three begin."""
    draw, value, control = random.Random(0), [], []
    full = set(range(3, 24, 4))
    for _ in range(400):
        norms = [draw.random() for _ in range(24)]
        value.append(sink_spike_alignment(norms, full))
        control.append(shifted_places(sink_spike_alignment, norms, full).mean)
    assert sum(value) / 400 == pytest.approx(1 / 3, abs=0.03)
    assert sum(control) / 400 == pytest.approx(1 / 3, abs=0.03)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("Qwen3NextForCausalLM", [(LINEAR,), (FULL,), (LINEAR,), (FULL,)]),
        ("FalconH1ForCausalLM", [(FULL, STATE)] * 3),
        ("GptOssForCausalLM", [("window attention",), (FULL,)] * 2),
        ("NemotronHForCausalLM", [(STATE,), (), (FULL,), ()]),
        ("BloomForCausalLM/post", [(FULL,)] * 3),
        ("Gemma4ForCausalLM/shared", [("window attention",), (FULL,)] * 2),
    ],
)
def test_kinds_of_mixers(name, kinds):
    assert kinds_of(load(families.tiny(name))) == kinds


def test_a_state_is_what_plain_transformers_keeps():
    """Independent: the cache of a model that melens did not touch, its first layer's state."""
    plain = families.tiny("OlmoHybridForCausalLM").eval()
    row = ids()[0].tolist()
    cache, out = DynamicCache(config=plain.config), []
    hook = plain.model.layers[0].linear_attn.register_forward_hook(
        lambda module, args, made: out.append(made)
    )
    with torch.no_grad():
        plain(torch.tensor([row[:1]]), past_key_values=cache, use_cache=True)
        write = cache.layers[0].recurrent_states[0].clone()
        for kept in (1.0, 0.0):
            cache = DynamicCache(config=plain.config)
            plain(torch.tensor([row[:1]]), past_key_values=cache, use_cache=True)
            cache.layers[0].recurrent_states[0].mul_(kept)
            plain(torch.tensor([row[1:2]]), past_key_values=cache, use_cache=True)
    hook.remove()
    read = ((out[2] - out[4]).norm() / out[2].norm()).item()
    model = load(plain)
    parts = {
        b.layer: part for b in anatomy(model).blocks for part in mixer_parts(model, b).values()
    }
    found = follow(model, parts, row, 0, len(row) - 1)[0]
    assert found.norm == pytest.approx(write.norm().item(), rel=1e-5)
    assert found.rank == pytest.approx(1.0, abs=1e-4)  # one outer product k v'
    assert found.reads[0] == pytest.approx(read, rel=1e-4)
    assert len(found.reads) == len(row) - 1


def test_later_writes_are_told_from_what_was_there():
    """Linear in the state: a token's write is the same outer product whatever stands before it."""
    model = load(families.tiny("OlmoHybridForCausalLM"))
    parts = {
        b.layer: part for b in anatomy(model).blocks for part in mixer_parts(model, b).values()
    }
    found = follow(model, parts, ids()[0].tolist(), 7, 12)
    assert sorted(found) == [0, 2]
    for follower in found.values():
        assert follower.rank == pytest.approx(1.0, abs=1e-3)
        assert 0 < follower.left < 1
        assert follower.reads[0] > 0


@pytest.mark.parametrize(
    ("name", "half"),
    [
        ("Qwen3NextForCausalLM", 0.5),
        ("BailingHybridForCausalLM", 0.5),
        ("AfmoeForCausalLM", 0.5),
        ("LagunaForCausalLM", math.log(2)),
    ],
)
def test_an_output_gate_of_zero_weights_is_its_activation_at_zero(name, half):
    """A sigmoid at 0 is 1/2, Laguna's softplus ln 2; with TransformerLens' bridge and with ours."""
    plain = families.tiny(name)
    for block in plain.model.layers:
        mixer = getattr(block, "self_attn", None)
        gate = getattr(mixer, "g_proj", None) or getattr(mixer, "gate_proj", None)
        if gate is not None:
            gate.weight.data.zero_()
        elif mixer is not None and hasattr(mixer, "q_proj"):
            weight = mixer.q_proj.weight.data.view(4, 2, -1, mixer.q_proj.weight.shape[1])
            weight[:, 1] = 0  # each head's second half is its gate
    model = load(plain)
    found = gates(model, ids().tolist(), [0, 0, 0])
    assert set(found) == set(model_layers(model))
    for sums in found.values():
        assert sums.sink == pytest.approx([half] * 3, abs=1e-3)
        assert sums.others == pytest.approx([half] * 3, abs=1e-3)


def model_layers(model):
    return anatomy(model).attention_layers


def test_a_model_without_gates_has_none(tiny):
    assert gates(tiny, ids().tolist(), [0, 0, 0]) == {}


def adds_up(found):
    """All writes up to the peak, and the embedding, are the vector there."""
    before = found.layers[: found.peak_layer + 1]
    shares = sum(row.write_share + row.rest_share for row in before) + found.embedding_share
    return shares == pytest.approx(1.0, abs=1e-3)


def test_a_planted_token_is_followed_through_a_hybrid():
    plain = families.tiny("OlmoHybridForCausalLM")
    made = families.plant(plain, 1, 7)
    found = mixers(load(plain), None, [Batch.of(ids())])
    assert found == Mixers.from_json(found.to_json())
    assert (found.me_layer, found.full_layers, found.texts_massive) == (1, (1, 3), 3)
    assert found.layers[1].largest == pytest.approx(abs(made.value), rel=1e-3)
    assert found.is_set_apart
    assert adds_up(found)
    assert all((row.state is None) == (row.layer in (1, 3)) for row in found.layers)
    assert found.alignment is None  # one layer between full attention: nothing to compare
    assert len(found.plot().axes[1].patches) == 4  # a bar a layer


def test_padding_changes_nothing_and_norms_are_those_of_plain_transformers():
    plain = families.tiny("OlmoHybridForCausalLM").eval()
    rows = [row[:n].tolist() for row, n in zip(ids(), (20, 14, 17), strict=True)]
    model = load(plain)
    alone = mixers(model, None, [Batch.of(torch.tensor([row])) for row in rows])
    for side in ("left", "right"):
        padded = mixers(model, None, [Batch.pad(rows, side=side)])
        assert [row.norm for row in padded.layers] == pytest.approx(
            [row.norm for row in alone.layers], rel=1e-4
        )
        assert [row.median_norm for row in padded.layers] == pytest.approx(
            [row.median_norm for row in alone.layers], rel=1e-4
        )
        assert padded.position == alone.position
    with torch.no_grad():
        states = [
            families.tiny("OlmoHybridForCausalLM")
            .eval()(torch.tensor([row]), output_hidden_states=True, use_cache=False)
            .hidden_states[2][0]
            for row in rows
        ]
    seen = mixers(model, None, [Batch.of(torch.tensor([rows[0]]))])
    norms = states[0].norm(dim=-1)
    others = norms[torch.arange(20) != seen.position]
    assert seen.layers[1].norm == pytest.approx(norms[seen.position].item(), rel=1e-4)
    assert seen.layers[1].median_norm == pytest.approx(others.median().item(), rel=1e-4)


def test_texts_too_short_to_follow_a_state_are_said():
    model = load(families.tiny("Mamba2ForCausalLM"))
    found = mixers(model, None, [Batch.of(ids(4)), Batch.of(ids(6))])
    assert all(row.state is not None and row.state.steps == 2 for row in found.layers)
    assert found.chosen_by.startswith("no full attention can be read")
    assert found.full_layers == ()
    assert "No layer has full attention" in found.summary()


def test_blocks_whose_parts_cannot_be_told_are_not_said_to_write_nothing():
    found = mixers(load(families.tiny("DogeForCausalLM")), None, [Batch.of(ids())])
    assert all(row.write_share is None for row in found.layers)
    assert found.rows()[0]["write_share"] is None


def test_shares_are_of_the_layer_that_is_named_and_not_of_a_texts_own_peak():
    """Texts may peak elsewhere; all writes up to the named layer are the vector there."""
    resid = torch.tensor([[1.0, 0], [1, 9], [4, 2], [4, 1]], dtype=torch.float64)
    path = Path(1, 0, resid, torch.zeros(3, 2), resid.diff(dim=0))
    assert path.peak == 0
    added = _shares(path, path.resid.diff(dim=0), 1)
    assert sum(added[:2]) + _shares(path, resid[:1], 1)[0] == pytest.approx(1.0)
    assert added[1] == pytest.approx((3 * 4 - 7 * 2) / 20)


def test_small_structure_is_described_and_not_called_none():
    """A token at ten times the others' norm and far below 100 is set apart, before each reader."""
    plain = families.tiny("Lfm2ForCausalLM")
    with torch.no_grad():
        plain.get_input_embeddings().weight[1] *= 10
    found = mixers(load(plain), None, [Batch.of(ids())])
    assert found.me_layer is None
    assert (found.position, found.is_set_apart) == (0, True)
    assert adds_up(found)
    assert max(abs(row.write_share) for row in found.layers) > 0.01  # so that the sum tells
    assert "Sun et al.'s rule asks for 100" in found.summary()
    assert "layers have full attention" in found.summary()


def test_a_learned_sink_is_a_column_of_its_own():
    """Independent: what the rows of plain transformers' eager attention lack of 1."""
    plain = families.tiny("GptOssForCausalLM")
    plain.set_attn_implementation("eager")
    row = ids()[:1]
    with torch.no_grad():
        wanted = 1 - plain(row, output_attentions=True).attentions[0][0].sum(-1)
    found = attention(load(plain), None, [Batch.of(row)], layers=[0])
    for head in found.heads:
        assert head.learned == pytest.approx(wanted[head.head].tolist(), abs=1e-4)
        for own, keys in zip(head.learned, head.rows, strict=True):
            assert own + sum(keys) == pytest.approx(1.0, abs=2e-3)
    assert "(learned sink)" in found.view().html
    assert found.plot().axes[0].get_xticklabels()[0].get_text() == "learned"
