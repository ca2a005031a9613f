"""Routed experts: the planted one is named, and shares are what a hand-written pass gives."""

from __future__ import annotations

import families
import pytest
import torch

from melens.batches import Batch
from melens.errors import SiteError
from melens.isolating import isolate
from melens.models import load
from melens.models.experts import experts_of

LAYER, DIM = 1, 7


def ids():
    rows = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(5))
    rows[:, 0] = 1
    return rows


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_the_planted_expert_and_neuron_are_named(name):
    plain = families.tiny(name)
    made = families.plant(plain, LAYER, DIM)
    found = isolate(load(plain), None, [Batch.of(ids())], ffn_edit="drop")
    top = next(row for row in found.experts if row.layer == LAYER)
    assert (top.expert, top.neuron) == (made.expert, made.neuron)
    assert top.neuron_share == pytest.approx(1.0, abs=0.05)
    assert (LAYER, made.expert) in found.experts_to_protect
    weights = [row.weight for row in found.experts if row.layer == LAYER]
    assert sum(weights) == pytest.approx(1.0, abs=1e-5)  # two experts share one
    assert any("neurons of layer" in line for line in found.missing)


def test_shares_are_those_of_a_pass_written_by_hand():
    plain = families.tiny("MixtralForCausalLM")
    families.plant(plain, LAYER, DIM)
    given = []
    moe = plain.model.layers[LAYER].mlp
    handle = moe.register_forward_hook(lambda m, args, out: given.append((args[0], out)))
    with torch.no_grad():
        plain(torch.tensor([[1]]), use_cache=False)
    handle.remove()
    x, out = given[0][0][0], given[0][1].reshape(-1)
    expected = {}
    with torch.no_grad():
        scores = (x @ moe.gate.weight.T).softmax(-1)[0]
        chosen = scores.topk(2)
        for weight, expert in zip(chosen.values / chosen.values.sum(), chosen.indices, strict=True):
            gate, up = (x @ moe.experts.gate_up_proj[expert].T).chunk(2, -1)
            product = torch.nn.functional.silu(gate) * up
            write = (product @ moe.experts.down_proj[expert].T)[0, DIM] * weight
            expected[int(expert)] = (write / out[DIM]).item()
    found = isolate(load(plain), None, [Batch.of(ids())], ffn_edit="drop")
    shares = {row.expert: row.share for row in found.experts if row.layer == LAYER}
    assert shares == pytest.approx(expected, rel=1e-4)


def test_shares_are_of_what_the_experts_make_and_not_of_what_the_block_scales():
    """Granite adds a quarter of what its FFN makes: the experts still make all of it."""
    plain = families.tiny("GraniteMoeSWAForCausalLM")
    for block in plain.model.layers:
        block.residual_multiplier = 0.25
    families.plant(plain, LAYER, DIM)
    found = isolate(load(plain), None, [Batch.of(ids())], ffn_edit="drop")
    shares = [row.share for row in found.experts if row.layer == LAYER]
    assert sum(shares) == pytest.approx(1.0, abs=1e-4)


def test_experts_that_do_more_than_their_weights_say_are_refused():
    model = load(families.tiny("MixtralForCausalLM"))
    experts = experts_of(model, LAYER)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    assert experts.route(x).index.shape == (5, 2)
    handle = experts.module.register_forward_hook(lambda module, args, out: out * 1.1)
    with pytest.raises(SiteError, match="more than their weights say"):
        experts.route(x)
    handle.remove()


def test_a_block_without_experts_has_none(tiny):
    with pytest.raises(SiteError, match="block 1 has no routed experts"):
        experts_of(tiny, 1)
