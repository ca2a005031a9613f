"""What a block is made of, as data: which norms, which FFN, which sites; and tiny models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from melens.errors import FoldedWeightsError, ModelError, SiteError
from melens.protocols import HookedModel
from melens.registry import Registry

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float
    from torch import Tensor

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


MIXERS = ("hook_attn_out", "linear_attn.hook_out", "mamba.hook_out", "mixer.hook_out")
"""Sites through which a block's token mixer writes; a block has one of them, or two in parallel."""


@dataclass(frozen=True)
class Family:
    """What melens must know of a family beyond its hooks, and its tiny random test model."""

    architectures: tuple[str, ...]
    pre_norms: tuple[str, ...]
    """Norms before attention and before the FFN."""
    post_norms: tuple[str, ...]
    """Norms on the write path, between a part's output and the residual."""
    gain_offset: float
    """Effective gain = offset + stored weight (1 where the weight is kept around zero)."""
    tiny: Callable[[], object]


FAMILIES: Registry[Family] = Registry("model family")


def _family(name: str, *architectures: str, **facts: Any) -> None:
    usual = {"pre_norms": ("ln1", "ln2"), "post_norms": (), "gain_offset": 0.0}
    FAMILIES.add(name, Family(architectures, tiny=TINY[name], **{**usual, **facts}))


_SANDWICH = {"post_norms": ("ln1_post", "ln2_post"), "gain_offset": 1.0}
_family("llama", "LlamaForCausalLM")
_family("qwen2", "Qwen2ForCausalLM")
_family("qwen3", "Qwen3ForCausalLM")
_family("mistral", "MistralForCausalLM")
_family("phi3", "Phi3ForCausalLM")
_family("gemma2", "Gemma2ForCausalLM", **_SANDWICH)
_family("gemma3", "Gemma3ForCausalLM", **_SANDWICH)
_family("olmo2", "Olmo2ForCausalLM", pre_norms=(), post_norms=("ln1_post", "ln2_post"))
_family("gpt2", "GPT2LMHeadModel")
_family("neox", "GPTNeoXForCausalLM")
_family("mixtral", "MixtralForCausalLM")
_family("qwen3-moe", "Qwen3MoeForCausalLM")
_family("qwen3-next", "Qwen3NextForCausalLM", gain_offset=1.0)


@dataclass(frozen=True)
class Block:
    """One block's sites. ``attention``: its pattern has a hook; ``unread``: the block has attention
    all the same, and no hook shows it. A hybrid's other blocks have neither.
    """  # noqa: D205

    layer: int
    mixer_writes: tuple[str, ...]
    ffn_write: str | None
    attention: bool
    unread: bool
    norms: tuple[str, ...]


@dataclass(frozen=True)
class Anatomy:
    """A model's blocks, and its family's row if it has one."""

    family: str | None
    blocks: tuple[Block, ...]

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers that have attention: the only ones attention measures may speak of."""
        return tuple(block.layer for block in self.blocks if block.attention)

    def why_no_attention(self, layer: int | None = None) -> str:
        """Why a layer's attention, or all of it, cannot be looked at; a hook that is missing is not
        an absence.
        """  # noqa: D205
        wanted = self.blocks if layer is None else self.blocks[layer : layer + 1]
        if unread := [str(block.layer) for block in wanted if block.unread]:
            return (
                f"the attention of layer {', '.join(unread)} cannot be read here: TransformerLens "
                "has no hook for its pattern"
            )
        if layer is None:
            return "no layer of this model has attention"
        return f"layer {layer} has no attention"


def resid_pre(layer: int) -> str:
    """Hook name of the residual entering ``layer``."""
    return f"blocks.{layer}.hook_resid_pre"


def resid_post(layer: int) -> str:
    """Hook name of the residual leaving ``layer``: where layers are counted."""
    return f"blocks.{layer}.hook_resid_post"


def pattern_hook(layer: int) -> str:
    """Hook name of a layer's attention pattern."""
    return f"blocks.{layer}.attn.hook_pattern"


def anatomy(model: HookedModel) -> Anatomy:
    """The blocks of a TransformerBridge or HookedTransformer, read from its hook names.

    Raises:  ModelError: a block without any known write site.
    """
    known = set(model.hook_dict)
    row = family_of(model)
    return Anatomy(row, tuple(_block(model, known, layer) for layer in range(model.cfg.n_layers)))


def family_of(model: HookedModel) -> str | None:
    """Name of the family's row; None where melens has none (gains are then refused)."""
    architecture = getattr(model.cfg, "architecture", None)
    found = (name for name, row in FAMILIES.items() if architecture in row.architectures)
    return next(found, None)


def check_layer(model: HookedModel, layer: int) -> None:
    """Refuse a layer the model does not have.

    Raises:  SiteError: with the range that fits.
    """
    n = model.cfg.n_layers
    if not 0 <= layer < n:
        name = getattr(model.cfg, "model_name", "this model")
        raise SiteError(f"layer {layer} is outside 0..{n - 1} of {name}. Layers count from 0.")


def norm_gain(model: HookedModel, layer: int, norm: str) -> Float[Tensor, " d_model"]:
    """Effective gain of one norm, e.g. ``ln2``, in float32: what its normalised input is
    multiplied by.

    Raises:  FoldedWeightsError: the gains were folded away. SiteError: no such norm or layer.
             ModelError: melens has no row for this family, so the gain's offset is unknown.
    """  # noqa: D205
    from torch import Tensor

    check_layer(model, layer)
    require_unfolded(model)
    part = getattr(model.blocks[layer], norm, None)
    if part is None:
        raise SiteError(
            f"block {layer} has no norm '{norm}'; it has {', '.join(_norms(model, layer))}."
        )
    weight = getattr(part, "w", None) if not hasattr(part, "weight") else part.weight
    if not isinstance(weight, Tensor):
        raise FoldedWeightsError(f"blocks.{layer}.{norm} has no gain of its own.")
    row = family_of(model)
    if row is None and hasattr(model, "original_model"):
        raise ModelError(
            f"melens has no row for {model.cfg.architecture}, so it cannot say what its norms "
            "multiply by; docs/extending.md shows how to add one."
        )
    offset = FAMILIES[row].gain_offset if row else 0.0
    return weight.detach().float() + offset


def gains(model: HookedModel, layer: int) -> dict[str, Float[Tensor, " d_model"]]:
    """Effective gain of every norm of a block, by the norm's name."""
    check_layer(model, layer)
    return {norm: norm_gain(model, layer, norm) for norm in _norms(model, layer)}


def is_folded(model: HookedModel) -> bool:
    """Whether norm gains were folded into the next matrix (which may shift channels as well)."""
    kind = str(getattr(model.cfg, "normalization_type", None))
    return bool(getattr(model, "_weights_processed", False)) or kind.endswith("Pre")


def require_unfolded(model: HookedModel) -> None:
    """Refuse a model whose norm gains were folded into the next matrix.

    Raises:  FoldedWeightsError: saying how to load it unfolded.
    """
    if is_folded(model):
        raise FoldedWeightsError(
            "this model's norm gains are folded into the next weights (fold_ln or "
            "enable_compatibility_mode), so gamma reads 1 everywhere; load it with melens.load, or "
            "with HookedTransformer.from_pretrained_no_processing."
        )


def _norms(model: HookedModel, layer: int) -> tuple[str, ...]:
    return _block(model, set(model.hook_dict), layer).norms


def holds_attention(block: torch.nn.Module) -> bool:
    """Whether any module of a block calls itself attention, as all of transformers' do."""
    return any("Attention" in type(part).__name__ for part in block.modules())


def _block(model: HookedModel, known: set[str], layer: int) -> Block:
    prefix = f"blocks.{layer}."
    mixers = tuple(prefix + site for site in MIXERS if prefix + site in known)
    ffn = f"{prefix}hook_mlp_out"
    if not mixers and ffn not in known:
        raise ModelError(f"block {layer} has no write site melens knows ({', '.join(MIXERS)}).")
    norms = ("ln1", "ln1_post", "ln2", "ln2_post")
    return Block(
        layer=layer,
        mixer_writes=mixers,
        ffn_write=ffn if ffn in known else None,
        attention=(hooked := pattern_hook(layer) in known),
        unread=not hooked and holds_attention(model.blocks[layer]),
        norms=tuple(norm for norm in norms if f"{prefix}{norm}.hook_normalized" in known),
    )


def residual_dtype(model: HookedModel) -> torch.dtype:
    """The dtype that tolerances go by."""
    return next(model.parameters()).dtype
