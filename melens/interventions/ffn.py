"""Edits of an FFN: its product, its neurons, its weights, what it writes, another in its place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from melens.errors import InterventionError
from melens.formatting import brief
from melens.interventions.context import PassTokens
from melens.interventions.core import (
    EditedTokens,
    Place,
    blend,
    check_indices,
    check_number,
    editing,
    editing_module,
    intervention,
)
from melens.interventions.target import Tokens
from melens.models.anatomy import anatomy, norm_of
from melens.models.ffn import FFN, ffn_input, ffn_of
from melens.protocols import HookedModel, is_hooked
from melens.results.locate import MELayer
from melens.shapes import TokenMask


@intervention("ffn_pull_back", neutral={"strength": 0.0}, strong={"reference": 1e-3})
@contextmanager
def ffn_pull_back(
    model: HookedModel,
    layer: int | MELayer,
    *,
    tokens: Tokens = None,
    reference: float | None = None,
    strength: float = 1.0,
) -> Iterator[EditedTokens]:
    """Scale the product down to an ordinary token's: p *= min(1, reference / rms(p)).

    Args:    layer: a layer counted from 0, or a located ME Layer.
             tokens: see ``melens.interventions``.
             reference: an rms; None = the median over the other real tokens of the sequence, which
             a chosen token must have (later ones count too, so this reads ahead).
             strength: 0 changes nothing, 1 is the whole edit.
    Raises:  SiteError: no such layer, or an FFN without neurons. InterventionError: no other token
             to take a reference from; at the end, if nothing was edited.
    Source:  the ME-Layer authors' released code, ablation F1.
    """
    check_number("strength", strength)
    check_reference(reference)
    place = Place.of(model, layer, tokens)

    def edit(x: Tensor, chosen: TokenMask, now: PassTokens) -> Tensor:
        size = _rms(x)
        limit = _reference(size, chosen, now, reference)
        factor = (limit / size[chosen].clamp_min(1e-30)).clamp(max=1.0)
        return blend(x[chosen], x[chosen] * factor[:, None], strength)

    whole = reference is None
    with editing(place, {ffn_of(model, place.layer).product: edit}, whole=whole) as edited:
        yield edited


@intervention("ffn_rms_normalise", neutral={"strength": 0.0}, strong={})
@contextmanager
def ffn_rms_normalise(
    model: HookedModel, layer: int | MELayer, *, tokens: Tokens = None, strength: float = 1.0
) -> Iterator[EditedTokens]:
    """Divide the product by its root mean square: p / rms(p); strength 0 changes nothing.

    Source:  the ME-Layer authors' released code, ablation F2.
    """
    check_number("strength", strength)
    place = Place.of(model, layer, tokens)

    def edit(x: Tensor, chosen: TokenMask, now: PassTokens) -> Tensor:
        rows = x[chosen]
        return blend(rows, rows / _rms(rows).clamp_min(1e-30)[:, None], strength)

    with editing(place, {ffn_of(model, place.layer).product: edit}) as edited:
        yield edited


@intervention(
    "ffn_cap",
    neutral={"factor": math.inf, "reference": 1.0},
    strong={"factor": 0.5, "reference": 1e-3},
)
@contextmanager
def ffn_cap(
    model: HookedModel,
    layer: int | MELayer,
    *,
    tokens: Tokens = None,
    reference: float | None = None,
    factor: float = 2.0,
    strength: float = 1.0,
) -> Iterator[EditedTokens]:
    """Cap the norm of what the FFN writes at ``factor`` times the reference norm.

    What is written is taken as it enters the residual, a norm on the write path included.

    Args:    reference: a norm; None = the median over the sequence's other real tokens.
             factor: infinity changes nothing.
             strength: 0 changes nothing, 1 caps.
    Raises:  as ``ffn_pull_back``.
    Source:  the ME-Layer authors' released code, ablation F3 (there with factor 2).
    """
    check_number("factor", factor, low=0.0)
    check_number("strength", strength)
    check_reference(reference)
    place = Place.of(model, layer, tokens)

    def edit(x: Tensor, chosen: TokenMask, now: PassTokens) -> Tensor:
        if factor == math.inf:
            return x[chosen]
        size = x.norm(dim=-1)
        limit = factor * _reference(size, chosen, now, reference)
        scale = (limit / size[chosen].clamp_min(1e-30)).clamp(max=1.0)[:, None]
        return blend(x[chosen], x[chosen] * scale, strength)

    with editing(place, {_write_site(place): edit}, whole=reference is None) as edited:
        yield edited


@intervention("ffn_scale", neutral={"factor": 1.0}, strong={"factor": 30.0})
@contextmanager
def ffn_scale(
    model: HookedModel, layer: int | MELayer, *, tokens: Tokens = None, factor: float = 0.0
) -> Iterator[EditedTokens]:
    """Multiply what the FFN makes, before a norm on its write path; 1 changes nothing.

    A norm after the FFN restores the size: there, only factor 0 removes it. ``write_block`` acts
    after such a norm.
    """
    check_number("factor", factor)
    place = Place.of(model, layer, tokens)
    with editing(
        place, {ffn_of(model, place.layer).output: lambda x, chosen, _: x[chosen] * factor}
    ) as edited:
        yield edited


@intervention(
    "ffn_ablate_neurons",
    neutral={"neurons": [0], "factor": 1.0},
    strong={"neurons": list(range(32)), "factor": 30.0},
)
@contextmanager
def ffn_ablate_neurons(
    model: HookedModel,
    layer: int | MELayer,
    *,
    neurons: Sequence[int],
    tokens: Tokens = None,
    factor: float = 0.0,
) -> Iterator[EditedTokens]:
    """Multiply the product of chosen neurons; 0 ablates them, 1 changes nothing."""
    check_number("factor", factor)
    place = Place.of(model, layer, tokens)
    ffn = ffn_of(model, place.layer)
    wanted = check_indices("neurons", neurons, len(ffn.down), what=f"layer {place.layer}'s neurons")

    def edit(x: Tensor, chosen: TokenMask, now: PassTokens) -> Tensor:
        rows = x[chosen]
        rows[:, wanted] *= factor
        return rows

    with editing(place, {ffn.product: edit}) as edited:
        yield edited


@intervention(
    "ffn_zero_weights",
    neutral={"weights": [(0, 0)], "factor": 1.0},
    strong={"weights": [(i, j) for i in range(8) for j in range(32)], "factor": 90.0},
)
@contextmanager
def ffn_zero_weights(
    model: HookedModel,
    layer: int | MELayer,
    *,
    weights: Sequence[tuple[int, int]],
    tokens: Tokens = None,
    factor: float = 0.0,
) -> Iterator[EditedTokens]:
    """Multiply single entries of the down projection, as (row = residual dim, column = neuron).

    The weights themselves are not written to: what they add is taken off where the projection
    makes its output, after all edits of its input and before all edits of its output.

    Args:    factor: 0 removes the weights, 1 changes nothing. Nested edits of one entry add up.
    Raises:  SiteError: a model whose down projection is no module of its own (HookedTransformer).
    """
    check_number("factor", factor)
    place = Place.of(model, layer, tokens)
    ffn = ffn_of(model, place.layer)
    pairs = list(weights) if isinstance(weights, (list, tuple)) else []
    if not pairs or any(not isinstance(pair, tuple) or len(pair) != 2 for pair in pairs):
        raise InterventionError(f"weights must be (row, column) pairs, got {brief(weights)}.")
    rows = check_indices("rows", [row for row, _ in weights], ffn.down.shape[1], what="d_model")
    columns = check_indices("columns", [c for _, c in weights], len(ffn.down), what="the neurons")
    entries = list(dict.fromkeys(zip(rows, columns, strict=True)))

    def edit(x: Tensor, product: Tensor, chosen: TokenMask) -> Tensor:
        made = x[chosen]
        for row, column in entries if factor != 1 else ():
            made[:, row] += (factor - 1) * product[:, column] * ffn.down[column, row].to(x)
        return made

    with editing_module(place, ffn.projection, edit) as edited:
        yield edited


def check_reference(reference: float | None) -> None:
    """Refuse a reference that is no positive number."""
    if reference is not None and not check_number("reference", reference) > 0:
        raise InterventionError(f"reference must be above 0, got {brief(reference, 40)}.")


def _write_site(place: Place) -> str:
    site = anatomy(place.model).blocks[place.layer].ffn_write
    if site is None:
        raise InterventionError(f"block {place.layer} has no FFN.")
    return site


def _rms(x: Float[Tensor, "*row d"]) -> Float[Tensor, "*row"]:
    return reduce(x.square(), "... d -> ...", "mean").sqrt()


def _reference(
    size: Float[Tensor, "batch pos"], chosen: TokenMask, now: PassTokens, fixed: float | None
) -> Float[Tensor, " chosen"]:
    """One reference a chosen token: the median size of its sequence's other real tokens."""
    if fixed is not None:
        return size.new_full((int(chosen.sum()),), fixed)
    others = now.real.to(size.device) & ~chosen
    if not others[chosen.any(dim=1)].any(dim=1).all():
        raise InterventionError(
            "this edit takes its reference from the sequence's other tokens, and there are none in "
            "this pass (a one-token input, or a chunk of cached decoding); pass reference=."
        )
    medians = size.masked_fill(~others, math.nan).nanmedian(dim=1).values
    return medians[torch.nonzero(chosen)[:, 0]]


PARTS = ("norm", "ffn")


@intervention(
    "transplant", neutral={"donor": 0, "strength": 0.0}, strong={"donor": 0, "parts": ("ffn",)}
)
@contextmanager
def transplant(
    model: HookedModel,
    layer: int | MELayer,
    *,
    donor: HookedModel | int | tuple[HookedModel, int],
    parts: tuple[str, ...] = PARTS,
    tokens: Tokens = None,
    strength: float = 1.0,
) -> Iterator[EditedTokens]:
    """Use the pre-FFN norm's gain and the FFN of another checkpoint, or of another layer.

    The donor's formula is computed on the chosen tokens, in float32 at least; neither model is
    written to. A norm after the FFN stays the model's own.

    Args:    donor: a hooked model of the same width (its layer of the same number is taken),
             another layer's number of this model, or both as (model, layer).
             parts: ``("norm", "ffn")`` or one of them.
             strength: 0 changes nothing, 1 is the donor's, a mixture between.
    Raises:  InterventionError: nothing to take, another width, unknown parts, a model whose FFN
             has no norm before it (then only ``("ffn",)``), or one whose FFN writes more than its
             formula (Bloom's and MPT's holds the residual). SiteError: no such layer.
    Source:  the ME-Layer authors' released code, ablation T1.
    """
    check_number("strength", strength)
    place = Place.of(model, layer, tokens)
    donor, at = _donor(model, place, donor)
    if not parts or set(parts) - set(PARTS):
        raise InterventionError(f"parts must be some of {', '.join(PARTS)}, got {brief(parts)}.")
    own, other = ffn_of(model, place.layer), ffn_of(donor, at)
    used = other if "ffn" in parts else own
    read = entry = ffn_input(model, place.layer)
    shift = None
    if "norm" in parts:
        norm = anatomy(model).blocks[place.layer].ffn_norm or "ln2"
        read = place.hook(f"{norm}.hook_normalized")
        found = norm_of(donor, at, anatomy(donor).blocks[at].ffn_norm or "ln2")
        shift = found.gain, found.bias
    seen: dict[str, Tensor] = {}

    def edit(x: Tensor, chosen: TokenMask, now: PassTokens) -> Tensor:
        if strength == 0:
            return x[chosen]
        _require_own(own, place, seen[entry][chosen], x[chosen])
        rows = seen[read][chosen].to(x.dtype)
        if shift is not None:
            rows = rows * shift[0].to(rows) + shift[1].to(rows)
        made = used.written(used.product_of(rows.to(used.down.device)))
        return blend(x[chosen], made.to(x.device, x.dtype), strength)

    reads = {site: partial(seen.__setitem__, site) for site in (read, entry)}
    with editing(place, {own.output: edit}, reads=reads) as edited:
        yield edited


OWN_TOLERANCE = 5e-2
"""Of a token's largest write: half precision stays below, a residual or a factor does not."""


def _require_own(own: FFN, place: Place, rows: Tensor, written: Tensor) -> None:
    """Refuse to replace what is not the FFN's formula alone.

    Raises:  InterventionError: the block's output there is another than its formula's.
    """
    made = own.written(own.product_of(rows.to(own.down.device, written.dtype)))
    off = (made.to(written.device, torch.float32) - written.float()).abs().amax(-1)
    if bool((off > OWN_TOLERANCE * written.float().abs().amax(-1)).any()):
        raise InterventionError(
            f"the FFN of layer {place.layer} writes something else than its formula (a residual, a "
            "factor or a norm inside), so another FFN cannot take its place."
        )


def _donor(model: HookedModel, place: Place, given: object) -> tuple[HookedModel, int]:
    pair = given if isinstance(given, tuple) and len(given) == 2 else (given, place.layer)
    if isinstance(given, int) and not isinstance(given, bool):
        pair = model, given
    donor: object = pair[0]
    if not isinstance(pair[1], int):
        raise InterventionError(f"the donor's layer must be a number, got {brief(pair[1], 40)}.")
    if not is_hooked(donor):
        raise InterventionError(
            "donor must be a hooked model, a layer's number or (model, layer), got "
            f"{type(donor).__name__}; melens.load a model first."
        )
    if donor.cfg.d_model != model.cfg.d_model:
        raise InterventionError(
            f"the donor's residual has {donor.cfg.d_model} dimensions, the model's "
            f"{model.cfg.d_model}; only equal widths fit."
        )
    return donor, pair[1]
