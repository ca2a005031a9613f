"""Kinds of mixers, a hybrid's rhythm, output gates, recurrent states, learned sinks."""

from __future__ import annotations

import families
import pytest
import torch
from transformers import DynamicCache

from melens.batches import Batch
from melens.measuring import attention, mixers
from melens.measuring.gates import gates
from melens.measuring.states import follow
from melens.measuring.token_mixers import kinds_of, mixer_parts
from melens.metrics.hybrid import (
    inter_spike_retention,
    shuffled_places,
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
    # before 2: layers 0 and 1, the largest at 1; before 5: 3 and 4, at 4; before 7: 6 alone
    assert sink_spike_alignment(norms, {2, 5, 7}) == 1.0
    # before 3: layers 0 to 2, the largest at 1; before 6: 4 and 5, the largest at 4
    assert sink_spike_alignment(norms, {3, 6}) == 0.0
    assert sink_spike_alignment(norms, {0, 1}) is None
    # before 3 the largest is at 1, before 5 it is layer 4, alone
    assert sink_spike_alignment(norms, {3, 5}) == 0.5
    # peaks at 1 and 4; between them, without full attention, layer 3: 4 of the smaller peak, 8
    assert inter_spike_retention(norms, {2, 5}) == pytest.approx(4 / 8)
    assert inter_spike_retention(norms, {2}) is None
    assert inter_spike_retention([3, 2, 7, 4], {1, 4}) == 1.0  # capped: a bump is no loss


def test_growth_alone_is_as_aligned_at_random_places():
    grown = list(range(1, 13))
    control = shuffled_places(sink_spike_alignment, grown, {3, 7, 11}, seed=0)
    assert (control.mean, control.low) == (1.0, 1.0)
    spiky = [9 if layer % 4 == 2 else 1 + layer / 100 for layer in range(12)]
    assert sink_spike_alignment(spiky, {3, 7, 11}) == 1.0
    assert shuffled_places(sink_spike_alignment, spiky, {3, 7, 11}, seed=0).mean < 0.8


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("Qwen3NextForCausalLM", [(LINEAR,), (FULL,), (LINEAR,), (FULL,)]),
        ("FalconH1ForCausalLM", [(FULL, STATE)] * 3),
        ("GptOssForCausalLM", [("window attention",), (FULL,)] * 2),
        ("NemotronHForCausalLM", [(STATE,), (), (FULL,), ()]),
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
    found = follow(model, parts, row, 0)[0]
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
    found = follow(model, parts, ids()[0].tolist(), 7)
    assert sorted(found) == [0, 2]
    for follower in found.values():
        assert follower.rank == pytest.approx(1.0, abs=1e-3)
        assert 0 < follower.left < 1
        assert follower.reads[0] > 0


@pytest.mark.parametrize("name", ["Qwen3NextForCausalLM", "BailingHybridForCausalLM"])
def test_an_output_gate_of_zero_weights_is_one_half(name):
    """sigmoid(0); the first shows its gate, of the second only the ratio can be read."""
    plain = families.tiny(name)
    for block in plain.model.layers:
        mixer = getattr(block, "self_attn", None)
        if hasattr(mixer, "g_proj"):
            mixer.g_proj.weight.data.zero_()
        elif mixer is not None and hasattr(mixer, "q_proj"):
            weight = mixer.q_proj.weight.data.view(4, 2, -1, mixer.q_proj.weight.shape[1])
            weight[:, 1] = 0  # each head's second half is its gate
    model = load(plain)
    found = gates(model, ids().tolist(), [0, 0, 0])
    assert sorted(found) == [1, 3]
    for sums in found.values():
        assert sums.sink == pytest.approx([0.5] * 3, abs=1e-4)
        assert sums.others == pytest.approx([0.5] * 3, abs=1e-4)


def test_a_model_without_gates_has_none(tiny):
    assert gates(tiny, ids().tolist(), [0, 0, 0]) == {}


def adds_up(found):
    """All writes up to the peak, and the embedding, are the vector there."""
    before = found.layers[: found.peak_layer + 1]
    shares = sum(row.write_share + row.ffn_share for row in before) + found.embedding_share
    return shares == pytest.approx(1.0, abs=1e-3)


def test_a_planted_token_is_followed_through_a_hybrid():
    plain = families.tiny("OlmoHybridForCausalLM")
    made = families.plant(plain, 1, 7)
    found = mixers(load(plain), None, [Batch.of(ids())])
    assert found == Mixers.from_json(found.to_json())
    assert (found.me_layer, found.full_layers) == (1, (1, 3))
    assert found.layers[1].largest == pytest.approx(abs(made.value), rel=1e-3)
    assert found.is_set_apart
    assert adds_up(found)
    assert all((row.state is None) == (row.layer in (1, 3)) for row in found.layers)
    assert found.alignment is not None
    assert found.plot().axes


def test_small_structure_is_described_and_not_called_none():
    """A token at ten times the others' norm and far below 100 is set apart, before each reader."""
    plain = families.tiny("Lfm2ForCausalLM")
    with torch.no_grad():
        plain.get_input_embeddings().weight[1] *= 10
    found = mixers(load(plain), None, [Batch.of(ids())])
    assert found.me_layer is None
    assert (found.position, found.is_set_apart) == (0, True)
    assert adds_up(found)
    assert max(abs(row.write_share) for row in found.layers) > 0.01
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
