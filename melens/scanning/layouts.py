"""Which tensors make a block's FFN, by family, as data: in safetensors and in GGUF files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from melens.registry import Registry


@dataclass(frozen=True)
class Ffn:
    """Tensor names inside a block; ``{e}`` counts experts, a third dimension stacks them."""

    up: str
    down: str
    gate: str | None = None
    fused: bool = False
    """Whether ``up`` holds the gate's rows first and then its own."""
    expert: str | None = None
    """What its experts are called; None = one FFN for every token."""


@dataclass(frozen=True)
class Layout:
    """A family's blocks."""

    blocks: tuple[str, ...]
    """How a block's names may begin, ``{l}`` its layer."""
    ffns: tuple[Ffn, ...]
    """Those that a block has are found by their names."""
    norm: str | None
    """The norm that the FFN reads through; None = it reads the residual as it is."""
    post: str | None = None
    """An RMSNorm on the FFN's write path."""
    layer_norm: bool = False
    transposed: bool = False
    """Whether matrices are kept as (in, out)."""
    offset: float = 0.0
    """Effective gain = offset + stored weight."""
    act: str = "silu"
    """Where the config names none."""
    hybrid: bool = False
    """Whether some of its mixers are linear attention (DeltaNet)."""


DENSE = Ffn("mlp.up_proj.weight", "mlp.down_proj.weight", "mlp.gate_proj.weight")
FC = Ffn("mlp.fc1.weight", "mlp.fc2.weight")
STACKED = Ffn("mlp.experts.gate_up_proj", "mlp.experts.down_proj", fused=True, expert="{e}")
EACH = Ffn(
    "mlp.experts.{e}.up_proj.weight", "mlp.experts.{e}.down_proj.weight",
    "mlp.experts.{e}.gate_proj.weight", expert="{e}",
)  # fmt: skip
SHARED = Ffn(
    "mlp.shared_expert.up_proj.weight", "mlp.shared_expert.down_proj.weight",
    "mlp.shared_expert.gate_proj.weight", expert="shared",
)  # fmt: skip
W123 = Ffn(
    "block_sparse_moe.experts.{e}.w3.weight", "block_sparse_moe.experts.{e}.w2.weight",
    "block_sparse_moe.experts.{e}.w1.weight", expert="{e}",
)  # fmt: skip
BLOCKS = ("model.layers.{l}.",)
AFTER_ATTENTION = "post_attention_layernorm"

HF: Registry[Layout] = Registry("model type with an FFN layout")
"""By ``model_type`` of config.json; gains as in ``melens.models.anatomy.FAMILIES``."""


def _hf(name: str, *ffns: Ffn, **facts: Any) -> None:
    usual: dict[str, Any] = {"blocks": BLOCKS, "norm": AFTER_ATTENTION}
    HF.add(name, Layout(ffns=ffns or (DENSE,), **{**usual, **facts}))


_SANDWICH = {
    "norm": "pre_feedforward_layernorm", "post": "post_feedforward_layernorm", "offset": 1.0,
    "act": "gelu_pytorch_tanh",
}  # fmt: skip
_hf("llama")
_hf("qwen2")
_hf("qwen3")
_hf("mistral")
_hf("phi3", Ffn("mlp.gate_up_proj.weight", "mlp.down_proj.weight", fused=True))
_hf("gemma", offset=1.0, act="gelu_pytorch_tanh")
_hf("gemma2", **_SANDWICH)
_hf("gemma3_text", **_SANDWICH)
_hf("olmo2", norm=None, post="post_feedforward_layernorm")
_hf(
    "gpt2", Ffn("mlp.c_fc.weight", "mlp.c_proj.weight"), norm="ln_2", layer_norm=True,
    transposed=True, act="gelu_new", blocks=("transformer.h.{l}.", "h.{l}."),
)  # fmt: skip
_hf(
    "gpt_neox", Ffn("mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight"), layer_norm=True,
    act="gelu", blocks=("gpt_neox.layers.{l}.", "layers.{l}."),
)  # fmt: skip
_hf("phi", FC, norm="input_layernorm", layer_norm=True, act="gelu_new")
_hf(
    "opt", Ffn("fc1.weight", "fc2.weight"), norm="final_layer_norm", layer_norm=True, act="relu",
    blocks=("model.decoder.layers.{l}.", "decoder.layers.{l}."),
)  # fmt: skip
_hf("mixtral", W123, STACKED)
_hf("qwen3_moe", DENSE, EACH, STACKED)
_hf("qwen3_next", DENSE, EACH, STACKED, SHARED, offset=1.0, hybrid=True)

GGUF: Registry[Layout] = Registry("GGUF architecture with an FFN layout")
"""By ``general.architecture``. Gains kept around zero were made whole when the file was written."""

_GATED = Ffn("ffn_up.weight", "ffn_down.weight", "ffn_gate.weight")
_UNGATED = Ffn("ffn_up.weight", "ffn_down.weight")
_ALL_EXPERTS = Ffn(
    "ffn_up_exps.weight", "ffn_down_exps.weight", "ffn_gate_exps.weight", expert="{e}"
)
_ONE_EXPERT = Ffn(
    "ffn_up.{e}.weight", "ffn_down.{e}.weight", "ffn_gate.{e}.weight", expert="{e}"
)  # fmt: skip
_SHARED_EXPERT = Ffn(
    "ffn_up_shexp.weight", "ffn_down_shexp.weight", "ffn_gate_shexp.weight", expert="shared"
)


def _gguf(name: str, *ffns: Ffn, **facts: Any) -> None:
    usual: dict[str, Any] = {"blocks": ("blk.{l}.",), "norm": "ffn_norm"}
    GGUF.add(name, Layout(ffns=ffns or (_GATED,), **{**usual, **facts}))


_GELU = {"act": "gelu_pytorch_tanh"}
_gguf("llama", _GATED, _ALL_EXPERTS, _ONE_EXPERT)
_gguf("qwen2")
_gguf("qwen3")
_gguf("phi3", Ffn("ffn_up.weight", "ffn_down.weight", fused=True))
_gguf("gemma", **_GELU)
_gguf("gemma2", post="post_ffw_norm", **_GELU)
_gguf("gemma3", post="post_ffw_norm", **_GELU)
_gguf("olmo2", norm=None, post="post_ffw_norm")
_gguf("gpt2", _UNGATED, layer_norm=True, act="gelu_new")
_gguf("gptneox", _UNGATED, layer_norm=True, act="gelu")
_gguf("phi2", _UNGATED, norm="attn_norm", layer_norm=True, act="gelu_new")
_gguf("qwen3moe", _GATED, _ALL_EXPERTS)
_gguf(
    "qwen3next", _GATED, _ALL_EXPERTS, _SHARED_EXPERT, norm="post_attention_norm", hybrid=True
)  # fmt: skip
