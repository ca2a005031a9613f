"""What a block is made of, read from hooks and modules: which norms, which FFN, which sites."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

from melens.errors import FoldedWeightsError, ModelError, SiteError
from melens.protocols import HookedModel
from melens.settings import LARGEST, require_whole

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float
    from torch import Tensor

    from melens.models.norms import Norm

OTHERS = ("other_1", "other_2", "other_3")
"""Names of further token-wise parts, where a block has them (Gemma-4, Granite's shared expert)."""
MIXERS = ("hook_attn_out", "linear_attn.hook_out", "mamba.hook_out", "mixer.hook_out")
"""Sites through which a block's token mixer writes; a block has one of them, or two in parallel."""


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
    others: tuple[str, ...] = ()
    """Sites of further parts that add to the residual token by token, as the FFN does."""
    untold: str = ""
    """Why its parts are not known, where only its residual and its attention could be told."""
    learned_sink: bool = False
    """Whether a learned logit takes its share of every attention row (gpt-oss)."""

    @property
    def ffn_norm(self) -> str | None:
        """The norm that the FFN reads through: ``ln2``, or ``ln1`` where a parallel block has one
        norm for both parts (Cohere, GPT-J, Phi); None without one (OLMo-2).
        """  # noqa: D205
        if "ln2" in self.norms:
            return "ln2"
        shared = "ln1" in self.norms and "ln2_post" not in self.norms
        return "ln1" if shared and self.ffn_write is not None else None


@dataclass(frozen=True)
class Anatomy:
    """A model's blocks."""

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
                f"the attention of layer {', '.join(unread)} cannot be read here: no hook "
                "shows its pattern"
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
    if getattr(model, "blocks", None) is None:
        raise ModelError("it has no list of blocks that run one after another.")
    return Anatomy(tuple(_block(model, known, layer) for layer in range(model.cfg.n_layers)))


def check_layer(model: HookedModel, layer: int) -> None:
    """Refuse a layer the model does not have.

    Raises:  SiteError: with the range that fits.
    """
    n = model.cfg.n_layers
    require_whole("layer", layer, least=-LARGEST, error=SiteError)
    if not 0 <= layer < n:
        from melens.models.origin import origin_of

        name = origin_of(model).name
        raise SiteError(f"layer {layer} is outside 0..{n - 1} of {name}. Layers count from 0.")


def norm_of(model: HookedModel, layer: int, norm: str) -> Norm:
    """What one norm, e.g. ``ln2``, makes of its input: measured on a bridge, read off a
    HookedTransformer, whose weights are what it multiplies by.

    Raises:  FoldedWeightsError: the gains were folded away. SiteError: no such norm or layer.
             ModelError: the module is no normalisation times a gain, or does not stand where its
             name says.
    """  # noqa: D205
    from melens.models.norms import measured_norm, stored_norm

    check_layer(model, layer)
    require_unfolded(model)
    part = getattr(model.blocks[layer], norm, None)
    if part is None:
        raise SiteError(
            f"block {layer} has no norm '{norm}'; it has {', '.join(_norms(model, layer))}."
        )
    where = f"blocks.{layer}.{norm}"
    if (why := MISPLACED.get(model, {}).get((layer, norm))) is not None:
        raise ModelError(f"{where} {why}, so melens does not read its gain.")
    inner = getattr(part, "original_component", None)
    if inner is None:
        return stored_norm(part, where=where)
    return measured_norm(inner, model.cfg.d_model, where=where)


def norm_gain(model: HookedModel, layer: int, norm: str) -> Float[Tensor, " d_model"]:
    """Effective gain of one norm, e.g. ``ln2``, in float32: what its normalised input is
    multiplied by.

    Raises:  as :func:`norm_of`. FoldedWeightsError: the norm has no gain at all (OLMo-1).
    """  # noqa: D205
    found = norm_of(model, layer, norm)
    if found.is_bare:
        raise FoldedWeightsError(
            f"blocks.{layer}.{norm} has no gain of its own: it only normalises."
        )
    return found.gain


MISPLACED: weakref.WeakKeyDictionary[HookedModel, dict[tuple[int, str], str]] = (
    weakref.WeakKeyDictionary()
)
"""Model to (layer, norm) to what the check at loading found wrong with it."""


def gains(model: HookedModel, layer: int) -> dict[str, Float[Tensor, " d_model"]]:
    """Effective gain of every norm of a block, by the norm's name; ones where it has none."""
    check_layer(model, layer)
    return {norm: norm_of(model, layer, norm).gain for norm in _norms(model, layer)}


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


def holds_attention(block: torch.nn.Module, path: str = "") -> bool:
    """Whether any module of a block, or of one part of it, calls itself attention, as all of
    transformers' do. The block's own name says which kind of layer it is, and is left out.
    """  # noqa: D205
    parts = dict(block.get_submodule(path).named_modules())
    whole = () if path else ("", "_original_component")  # a bridge keeps the block inside
    return any("Attention" in type(m).__name__ for name, m in parts.items() if name not in whole)


def _block(model: HookedModel, known: set[str], layer: int) -> Block:
    prefix = f"blocks.{layer}."
    mixers = tuple(prefix + site for site in MIXERS if prefix + site in known)
    if f"{prefix}ln1_post.hook_out" in known and prefix + MIXERS[0] in known:
        mixers = (prefix + MIXERS[0],)  # what the norm after the mixer writes
    ffn = f"{prefix}hook_mlp_out"
    untold = str(getattr(model.blocks[layer], "_untold", ""))
    if not mixers and ffn not in known and not untold:
        raise ModelError(f"block {layer} has no write site melens knows ({', '.join(MIXERS)}).")
    norms = ("ln1", "ln1_post", "ln2", "ln2_post")
    return Block(
        layer=layer,
        mixer_writes=() if untold else mixers,
        ffn_write=ffn if ffn in known else None,
        attention=(hooked := pattern_hook(layer) in known),
        unread=not hooked and holds_attention(model.blocks[layer]),
        norms=tuple(norm for norm in norms if f"{prefix}{norm}.hook_normalized" in known),
        others=tuple(f"{prefix}{n}.hook_out" for n in OTHERS if f"{prefix}{n}.hook_out" in known),
        untold=untold,
        learned_sink=bool(getattr(getattr(model.blocks[layer], "attn", None), "_learned_sink", 0)),
    )


def residual_dtype(model: HookedModel) -> torch.dtype:
    """The dtype that tolerances go by."""
    return next(model.parameters()).dtype
