"""One contract for every family, present and future: a row brings its own test model."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY

from melens.batches import Batch
from melens.errors import ContractError, FoldedWeightsError, ModelError, SiteError
from melens.locating import locate
from melens.models import anatomy, check_contract, gains, load
from melens.models.anatomy import MISPLACED, norm_gain

SANDWICH = {"ln1", "ln1_post", "ln2", "ln2_post"}
NORMS = {"gemma2": SANDWICH, "gemma3": SANDWICH, "olmo2": {"ln1_post", "ln2_post"}}
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", list(TINY))
def test_family_contract(family, make_tiny, tokenizer):
    hf = make_tiny(family)
    with torch.no_grad():
        plain = hf(IDS).logits
        states = hf(IDS, output_hidden_states=True).hidden_states
    model = load(hf, tokenizer=tokenizer)
    assert not model.training
    torch.testing.assert_close(model(IDS), plain, rtol=1e-4, atol=1e-5)
    parts = anatomy(model)
    n = model.cfg.n_layers
    _, cache = model.run_with_cache(IDS, names_filter=lambda name: name.endswith("resid_post"))
    for layer in range(n - 1):  # HF puts the final norm on the last one
        torch.testing.assert_close(
            cache[f"blocks.{layer}.hook_resid_post"], states[layer + 1], rtol=1e-4, atol=1e-5
        )
    hybrid = [block.layer for block in parts.blocks if not block.attention]
    assert hybrid == ([0, 2] if family == "qwen3-next" else [])
    assert set(gains(model, 1)) == NORMS.get(family, {"ln1", "ln2"})
    assert not MISPLACED[model]


@pytest.mark.parametrize("family", list(TINY))
def test_every_family_can_be_located_and_profiled(family, make_tiny, tokenizer):
    hf = make_tiny(family)
    with torch.no_grad():
        states = hf(IDS, output_hidden_states=True).hidden_states
    found = locate(load(hf, tokenizer=tokenizer), [Batch.of(IDS)])
    assert found.verdict == "none"
    for row in found.profile[:-1]:
        assert row.max == pytest.approx(states[row.layer + 1].abs().max().item(), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_bf16_models_pass_the_contract(family, make_tiny, tokenizer):
    load(make_tiny(family, dtype=torch.bfloat16), tokenizer=tokenizer)


def test_a_norm_that_stands_elsewhere_is_no_gain_to_go_by(make_tiny, tokenizer):
    model = load(make_tiny("llama"), tokenizer=tokenizer)
    part = model.blocks[1].ln2
    move = part.register_forward_pre_hook(lambda module, args: (args[0] * 2 - 1,))
    check_contract(model)
    with pytest.raises(ModelError, match=r"blocks\.1\.ln2 reads something else than the residual"):
        norm_gain(model, 1, "ln2")
    assert norm_gain(model, 1, "ln1").shape == (32,)
    move.remove()
    check_contract(model)
    assert norm_gain(model, 1, "ln2").shape == (32,)


def test_a_block_that_does_not_add_up_is_caught(tiny):
    leak = ("blocks.1.hook_resid_post", lambda x, hook: x + 1.0)
    with (
        tiny.hooks(fwd_hooks=[leak]),
        pytest.raises(ContractError, match=r"block 1: resid_pre \+ attention \+ FFN misses"),
    ):
        check_contract(tiny)


def test_attention_that_does_not_sum_to_one_is_caught(tiny):
    half = ("blocks.2.attn.hook_pattern", lambda x, hook: x / 2)
    with (
        tiny.hooks(fwd_hooks=[half]),
        pytest.raises(ContractError, match="block 2: attention rows miss 1"),
    ):
        check_contract(tiny)


def test_a_model_that_sees_later_tokens_is_caught(tiny):
    def even(pattern, hook):
        return torch.full_like(pattern, 1 / pattern.shape[-1])  # rows still sum to 1

    with (
        tiny.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", even)]),
        pytest.raises(ContractError, match="this model is not causal"),
    ):
        check_contract(tiny)


def test_gains_carry_the_offset_and_refuse_what_is_not_there(make_tiny, tokenizer):
    hf = make_tiny("gemma3")
    stored = hf.model.layers[1].pre_feedforward_layernorm.weight.detach().clone()
    model = load(hf, tokenizer=tokenizer)
    torch.testing.assert_close(norm_gain(model, 1, "ln2"), 1 + stored)
    with pytest.raises(SiteError, match=r"layer 7 is outside 0\.\.2"):
        gains(model, 7)
    with pytest.raises(SiteError, match="no norm 'ln9'"):
        norm_gain(model, 1, "ln9")


def test_folded_gains_are_refused(tiny):
    tiny.enable_compatibility_mode()
    with pytest.raises(FoldedWeightsError, match="gamma reads 1 everywhere"):
        norm_gain(tiny, 0, "ln2")
