"""The sites that can be patched: where a value is read, and how it is put into another run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from melens.errors import SiteError
from melens.models.anatomy import anatomy, check_layer, resid_post, resid_pre
from melens.models.attention import attention_sites
from melens.protocols import HookedModel
from melens.registry import Registry

BY_POSITION = ("layer", "position")
BY_HEAD = ("layer", "position", "head")


@dataclass(frozen=True)
class PatchPlace:
    """One site of one layer."""

    site: str
    layer: int
    hook: str
    """Where the value is read; where it is written too, unless it enters between blocks."""
    layout: str = "batch pos d"
    heads: int | None = None
    enters: int | None = None
    """A value of the stream between blocks is written as the input of this layer."""
    middle: bool = False
    """The stream after attention: read as the block's input + the hook's write, and written
    through that write, because editing ``hook_resid_mid`` would change the FFN's branch alone.
    """

    @property
    def joins(self) -> int:
        """The first layer that sees the patch."""
        return self.layer if self.enters is None else self.enters

    def view(self, x: Tensor) -> Tensor:
        """``[batch, pos, d]``, or ``[batch, pos, head, d]``; shares memory with ``x``."""
        if self.layout == "batch head pos d":
            return x.transpose(1, 2)
        return x.unflatten(-1, (self.heads, -1)) if self.heads and x.ndim == 3 else x


Finder = Callable[[HookedModel, int], PatchPlace | str]


@dataclass(frozen=True)
class Site:
    """A kind of place, with the axes that a sweep over it has by default."""

    axes: tuple[str, ...]
    find: Finder
    """(model, layer) -> the place, or the reason why there is none."""


SITES: Registry[Site] = Registry("site")


def _site(name: str, axes: tuple[str, ...] = BY_POSITION) -> Callable[[Finder], Finder]:
    def add(find: Finder) -> Finder:
        SITES.add(name, Site(axes, find))
        return find

    return add


@_site("resid_pre")
def _pre(model: HookedModel, layer: int) -> PatchPlace | str:
    return PatchPlace("resid_pre", layer, resid_pre(layer), enters=layer)


@_site("resid_mid")
def _mid(model: HookedModel, layer: int) -> PatchPlace | str:
    writes = anatomy(model).blocks[layer].mixer_writes
    parallel = getattr(model.cfg, "parallel_attn_mlp", False)
    if parallel or len(writes) != 1 or f"blocks.{layer}.hook_resid_mid" not in model.hook_dict:
        return "attention and FFN write in parallel, so there is no stream between them"
    return PatchPlace("resid_mid", layer, writes[0], middle=True)


@_site("resid_post")
def _post(model: HookedModel, layer: int) -> PatchPlace | str:
    return PatchPlace("resid_post", layer, resid_post(layer), enters=layer + 1)


@_site("attn_out")
def _attention(model: HookedModel, layer: int) -> PatchPlace | str:
    writes = anatomy(model).blocks[layer].mixer_writes
    if len(writes) != 1:
        return f"the block has {len(writes)} token mixers"
    return PatchPlace("attn_out", layer, writes[0])


@_site("mlp_out")
def _ffn(model: HookedModel, layer: int) -> PatchPlace | str:
    write = anatomy(model).blocks[layer].ffn_write
    return PatchPlace("mlp_out", layer, write) if write else "the block has no FFN"


def _norm(name: str) -> None:
    @_site(name)
    def find(model: HookedModel, layer: int) -> PatchPlace | str:
        hook = f"blocks.{layer}.{name}.hook_out"
        return PatchPlace(name, layer, hook) if hook in model.hook_dict else "there is no such norm"


def _projection(name: str) -> None:
    @_site(name, BY_HEAD)
    def find(model: HookedModel, layer: int) -> PatchPlace | str:
        found = attention_sites(model)
        view = next((view for view in found.layer(layer) if view.site == name), None)
        if view is None:
            return "; ".join(line for line in found.missing if line.startswith(f"{name}:"))
        return PatchPlace(name, layer, view.hook, layout=view.layout, heads=view.heads)


_norm("ln1")
_norm("ln2")


@_site("z", BY_HEAD)
def _heads(model: HookedModel, layer: int) -> PatchPlace | str:
    hook = f"blocks.{layer}.attn.hook_z"
    if hook not in model.hook_dict:
        if anatomy(model).blocks[layer].unread:
            return "it has no hook, so it cannot be read here"
        return "the layer has no attention"
    return PatchPlace("z", layer, hook, "batch pos head d", heads=model.cfg.n_heads)


for _name in ("q", "k", "v"):
    _projection(_name)


def places_of(
    model: HookedModel, site: str, layers: Sequence[int] | None
) -> tuple[list[PatchPlace], tuple[str, ...]]:
    """A site in the layers asked for (None = every layer that has it), and why others lack it.

    Raises:  UnknownNameError: no such site. SiteError: no such layer, or a layer without the site.
    """
    find = SITES[site].find
    for layer in layers or ():
        check_layer(model, layer)
    found = {layer: find(model, layer) for layer in layers or range(model.cfg.n_layers)}
    lacking = {layer: reason for layer, reason in found.items() if isinstance(reason, str)}
    places = [place for place in found.values() if isinstance(place, PatchPlace)]
    if lacking and (layers is not None or not places):
        layer, reason = next(iter(lacking.items()))
        there = [n for n, s in SITES.items() if isinstance(s.find(model, layer), PatchPlace)]
        raise SiteError(
            f"'{site}' cannot be patched at layer {layer}: {reason}. "
            f"Sites there: {', '.join(there)}."
        )
    return places, tuple(f"{site}, layer {layer}: {why}" for layer, why in lacking.items())
