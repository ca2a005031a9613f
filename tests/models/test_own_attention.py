"""A bridge must say what the model itself said: its attention is compared at every load."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import TINY
from transformers import AttentionInterface, AutoModelForCausalLM, FalconConfig, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from melens.errors import ContractError
from melens.models import anatomy, load
from melens.models.contract import own_answer, probe_ids
from melens.streaming.streamed import load_streamed

ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 64}
SIZES = {
    **ENDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def causal(query, key, scaling, keep=None):
    """Attention written out; ``keep`` [query, key] takes more keys away."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * scaling
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(~(seen if keep is None else seen & keep), -torch.inf)


def attend(change):
    def forward(module, query, key, value, attention_mask, scaling=None, **rest):
        weights = change(query, key, scaling).softmax(-1)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    return forward


def window(query, key, scaling):
    at = torch.arange(query.shape[-2])
    return causal(query, key, scaling, keep=at[:, None] - at[None] < 12)


OWN = {
    "test-same": lambda q, k, s: causal(q, k, s),
    "test-scale": lambda q, k, s: causal(q, k, s / 2),
    "test-cap": lambda q, k, s: (
        causal(q, k, s).div(0.05).tanh().mul(0.05) + causal(q, k, s).isneginf().float().mul(-1e9)
    ),
    "test-window": window,
}


def tiny_llama(attention, **settings):
    for name, change in OWN.items():
        AttentionInterface.register(name, attend(change))
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=2, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for name, value in model.named_parameters():
        if "proj" in name:
            value.data.mul_(8)  # attention that is not uniform
    return model.eval()


def same_as_by_itself(model, bridge):
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        torch.testing.assert_close(
            bridge(ids, use_cache=False), model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("attention", ["test-scale", "test-cap"])
def test_attention_of_its_own_kind_is_kept_and_not_read(attention, tokenizer):
    bridge = load(tiny_llama(attention), tokenizer=tokenizer)
    same_as_by_itself(tiny_llama(attention), bridge)
    assert all(block.unread for block in anatomy(bridge).blocks)


def test_the_same_attention_under_another_name_is_not(tokenizer):
    model = load(tiny_llama("test-same"), tokenizer=tokenizer)
    assert model.original_model.config._attn_implementation == "eager"


def test_a_short_window_is_run_past(tokenizer):
    read = load(tiny_llama("test-window"), tokenizer=tokenizer)  # nobody said that there is one
    assert not any(block.unread for block in anatomy(read).blocks)
    kept = load(tiny_llama("test-window", sliding_window=12), tokenizer=tokenizer)
    assert all(block.unread for block in anatomy(kept).blocks)
    same_as_by_itself(tiny_llama("test-window"), kept)


def test_a_folder_is_compared_with_its_default(tmp_path, tokenizer, monkeypatch):
    """What transformers takes by default is sdpa; here its scale is another."""

    def other(module, query, key, value, mask, scaling=None, **rest):
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling / 2, **rest)

    model = tiny_llama("sdpa")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    load(tmp_path, device="cpu")
    load_streamed(tmp_path, device="cpu")
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", other)
    for bridge in (load(tmp_path, device="cpu"), load_streamed(tmp_path, device="cpu")):
        assert all(block.unread for block in anatomy(bridge).blocks)
        assert bridge.original_model.config._attn_implementation == "sdpa"


def test_a_bridge_that_runs_a_model_otherwise_is_not_taken(tokenizer):
    """TransformerLens 4.3 adds Falcon's ALiBi to scores that Falcon scales together with it."""
    torch.manual_seed(0)
    config = FalconConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        alibi=True,
        multi_query=False,
        parallel_attn=False,
        **ENDS,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for value in model.parameters():
        value.data.mul_(6 if value.ndim > 1 else 1)
    bridge = load(copy.deepcopy(model), tokenizer=tokenizer)
    same_as_by_itself(model, bridge)
    assert all(block.unread for block in anatomy(bridge).blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rounding_is_let_pass(dtype, tokenizer):
    """Deep and with large weights: implementations drift apart by roundings alone."""
    torch.manual_seed(1)
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 12}, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    for value in model.parameters():
        value.data.mul_(6 if value.ndim > 1 else 1)
    load(model.to(dtype).eval(), tokenizer=tokenizer)


def test_the_probe_is_short_unless_a_short_window_asks_for_more():
    assert probe_ids(LlamaConfig(**SIZES)).shape == (2, 8)
    assert probe_ids(TINY["gemma3"]()).shape == (2, 32)
    assert probe_ids(LlamaConfig(**SIZES, sliding_window=4096)).shape == (2, 8)
    answer = own_answer(tiny_llama("sdpa"), upto=1)
    assert answer.logits is None
    assert list(answer.blocks) == [0, 1]


def test_rounding_that_a_me_layer_amplifies_is_let_pass():
    """2.4e-4 was seen on a fine-tuned SmolLM2; what is left out of an attention changes 1e-2."""
    from melens.models.contract import OwnAnswer

    def answer(off):
        blocks = {0: torch.full((1, 1, 2), 1.0 + off)}
        ids = torch.zeros(1, 1, dtype=torch.long)
        return OwnAnswer("it", "sdpa", False, ids, blocks, blocks[0])

    own = answer(0.0)
    own.require_same(answer(2.4e-4).blocks, answer(2.4e-4).logits)
    with pytest.raises(ContractError, match="from block 0 on"):
        own.require_same(answer(1e-2).blocks, answer(1e-2).logits)
