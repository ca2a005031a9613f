"""Where a model's queries, keys and values can be read, layer by layer, and in which layout.

Hooks differ: some are listed and never fire, some put heads before positions, one holds a gate as
well. A short run shows what is really there; what is not is named with its reason.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from melens.batches import Batch
from melens.capture import evaluating, forward, hooked
from melens.models.anatomy import Block, anatomy, pattern_hook, resid_post
from melens.protocols import HookedModel

HOOKS = {
    "ln1": "ln1.hook_out",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "q_norm": "attn.hook_q_normed",
    "k_norm": "attn.hook_k_normed",
    "rot_q": "attn.hook_rot_q",
    "rot_k": "attn.hook_rot_k",
    "v": "attn.hook_v",
}
"""Site -> hook: attention input after its norm's gain; queries and keys as projected, after
QK-norm, and as attention compares them (after RoPE); values."""
QUERY_SITES = frozenset({"q", "q_norm", "rot_q"})


@dataclass(frozen=True)
class HeadView:
    """One site of one layer, and how its tensors are laid out."""

    site: str
    layer: int
    hook: str
    layout: str
    """An einops pattern of the hook's tensor."""
    heads: int | None
    """Query heads, or key-value heads (fewer under grouped queries); None without heads."""

    def by_head(self, x: Tensor) -> Float[Tensor, "batch head pos d"]:
        """The tensor with heads in front; one head where the site has none."""
        heads = {"head": self.heads} if self.heads else {}
        return rearrange(x, f"{self.layout} -> batch {'head' if heads else '1'} pos d", **heads)


@dataclass(frozen=True)
class AttentionSites:
    """Everything that can be read, and what cannot with the reason."""

    views: tuple[HeadView, ...]
    patterns: dict[int, str]
    """Layer -> hook of its attention pattern; a layer that mixes in another way has none."""
    missing: tuple[str, ...]

    def layer(self, layer: int) -> tuple[HeadView, ...]:
        """Views of one layer."""
        return tuple(view for view in self.views if view.layer == layer)


_KNOWN: weakref.WeakKeyDictionary[object, AttentionSites] = weakref.WeakKeyDictionary()


def attention_sites(model: HookedModel) -> AttentionSites:
    """What can be read of a model's attention; found out once for every model."""
    if model not in _KNOWN:
        _KNOWN[model] = _look(model)
    return _KNOWN[model]


@torch.no_grad()
def _look(model: HookedModel) -> AttentionSites:
    """Run a few tokens through the model and note which attention hooks fire, and their shapes."""
    parts = anatomy(model)
    known = model.hook_dict
    names = {
        f"blocks.{layer}.{hook}": (layer, site)
        for layer in range(len(parts.blocks))
        for site, hook in HOOKS.items()
        if f"blocks.{layer}.{hook}" in known
    }
    shapes: dict[str, tuple[int, ...]] = {}

    def keep(name: str) -> Callable[..., None]:
        def read(x: Tensor, hook: object) -> None:
            shapes[name] = tuple(x.shape)

        return read

    length = _telling_length(model)
    ids = (torch.arange(length)[None] + 3) % min(model.cfg.d_vocab, 100)
    with hooked(model, [(name, keep(name)) for name in names]), evaluating(model):
        forward(model, Batch.of(ids))
    views, missing = [], []
    for layer, block in enumerate(parts.blocks):
        views.append(HeadView("resid_post", layer, resid_post(layer), "batch pos d", None))
        for site in HOOKS:
            name = f"blocks.{layer}.{HOOKS[site]}"
            if (found := _view(model, site, layer, name, shapes.get(name), length)) is not None:
                views.append(found)
            elif site in ("ln1", "q", "k", "v") or name in known:
                missing.append((site, layer, _reason(block, name, known, shapes)))
    patterns = {layer: pattern_hook(layer) for layer in parts.attention_layers}
    return AttentionSites(tuple(views), patterns, _gather(missing))


def _telling_length(model: HookedModel) -> int:
    """A length that no other axis has, so that the position axis can be told apart."""
    sizes = {getattr(model.cfg, name, None) for name in ("n_heads", "n_key_value_heads", "d_head")}
    sizes |= {2 * size for size in sizes if size}
    return next(n for n in (7, 9, 11, 13, 15, 17, 19, 21, 23) if n not in sizes)


def _view(
    model: HookedModel, site: str, layer: int, name: str, shape: tuple[int, ...] | None, length: int
) -> HeadView | None:
    if shape is None:
        return None
    if site == "ln1":
        return HeadView(site, layer, name, "batch pos d", None)
    expected = model.cfg.n_heads
    if site not in QUERY_SITES:
        expected = getattr(model.cfg, "n_key_value_heads", None) or expected
    if len(shape) == 3:
        heads, layout = shape[-1] // model.cfg.d_head, "batch pos (head d)"
    else:
        at = 1 if shape[1] == length else 2
        heads, layout = shape[3 - at], "batch pos head d" if at == 1 else "batch head pos d"
    return HeadView(site, layer, name, layout, heads) if heads == expected else None


def _reason(
    block: Block, name: str, known: Container[str], shapes: dict[str, tuple[int, ...]]
) -> str:
    if name in shapes:
        return "the hook holds more than the heads (a gate)"
    if name in known:
        return "the hook exists but never fires"
    if block.unread and ".attn." in name:
        return "attention cannot be read here, it has no hook"
    if not block.attention and ".attn." in name:
        return "the layer has no attention"
    return "the model has no such hook"


def _gather(missing: list[tuple[str, int, str]]) -> tuple[str, ...]:
    """One sentence a site and reason."""
    layers: dict[tuple[str, str], list[int]] = {}
    for site, layer, reason in missing:
        layers.setdefault((site, reason), []).append(layer)
    return tuple(
        f"{site}: {reason} (layers {', '.join(map(str, found))})"
        for (site, reason), found in layers.items()
    )
