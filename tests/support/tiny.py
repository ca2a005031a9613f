"""Tiny random models of the families that most tests walk, by a short name."""

from __future__ import annotations

from collections.abc import Callable

BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**BASE, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}


def _config(name: str, **settings: object) -> Callable[[], object]:
    def make() -> object:
        import transformers

        return getattr(transformers, name)(**settings)

    return make


TINY: dict[str, Callable[[], object]] = {
    "llama": _config("LlamaConfig", **GROUPED),
    "qwen2": _config("Qwen2Config", **GROUPED),
    "qwen3": _config("Qwen3Config", **HEADS),
    "mistral": _config("MistralConfig", **HEADS),
    "phi3": _config("Phi3Config", **GROUPED),
    "gemma2": _config("Gemma2Config", **HEADS, sliding_window=16),
    "gemma3": _config("Gemma3TextConfig", **HEADS, sliding_window=16),
    "olmo2": _config("Olmo2Config", **GROUPED),
    "gpt2": _config(
        "GPT2Config",
        vocab_size=64,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "neox": _config("GPTNeoXConfig", **BASE),
    "mixtral": _config("MixtralConfig", **GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": _config("Qwen3MoeConfig", **HEADS, **EXPERTS, moe_intermediate_size=32),
    "qwen3-next": _config(
        "Qwen3NextConfig",
        **{**HEADS, "num_hidden_layers": 4},
        **EXPERTS,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"] * 2,
    ),
}
