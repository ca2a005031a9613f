"""Edits of queries and keys; a token taken out of what later tokens can attend to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from melens.errors import InterventionError
from melens.formatting import brief
from melens.interventions.context import PassTokens, pass_of
from melens.interventions.core import (
    EditedTokens,
    Place,
    PreHook,
    as_index,
    before_modules,
    blend,
    check_number,
    editing,
    intervention,
    warn_of,
)
from melens.interventions.target import Tokens, require_located_here
from melens.interventions.wemask import Layers, layers_of
from melens.models.anatomy import residual_dtype
from melens.models.attention import HeadView, attention_sites
from melens.models.decoder import decoder_of
from melens.protocols import Args, Called, HookedModel, Kwargs
from melens.results.locate import MELayer
from melens.shapes import TokenMask

SITES = ("q", "k")


@intervention("qk_orthogonalise", neutral={"strength": 0.0}, strong={})
@contextmanager
def qk_orthogonalise(
    model: HookedModel,
    layer: int | MELayer,
    *,
    tokens: Tokens = None,
    of: tuple[str, ...] = SITES,
    itself: bool = True,
    strength: float = 1.0,
) -> Iterator[EditedTokens]:
    """Project the massive token's direction out of the queries and keys of its sequence.

    Head by head, as projected: before a QK-norm and before RoPE. Under a KV cache the direction
    that the prefill showed is kept for the chunks after it.

    Args:    layer: a layer with attention; the ME Layer's number means the layer after it, the
             first that reads the massive token.
             tokens: whose direction, one token a sequence; see ``melens.interventions``.
             of: ``("q", "k")`` or one of them.
             itself: whether the token's own query and key are projected too.
             strength: 0 changes nothing, 1 removes the direction.
    Raises:  InterventionError: no such site, two directions in one sequence, or a chunk whose
             prefill was not seen.
    Source:  the ME-Layer authors' released code, ablations A1 (all tokens) and A2 (all but the
             token itself).
    """
    check_number("strength", strength)
    at = Place.of(model, layer, tokens).layer + isinstance(layer, MELayer)
    place = Place.at(model, at, layer, tokens, known=at - 1)
    views = {view.site: view for view in attention_sites(model).layer(at)}
    of = (of,) if isinstance(of, str) else tuple(of or ())
    missing = [site for site in of if site not in SITES or site not in views]
    if missing or not of:
        raise InterventionError(
            f"layer {at} of this model shows no {', '.join(missing) if of else 'site'}; "
            f"of= takes {' and '.join(site for site in SITES if site in views) or 'nothing here'}."
        )
    everyone = Place(model, at, lambda now: now.real)
    edits = {
        views[site].hook: _Projection(views[site], place, itself=itself, strength=strength)
        for site in of
    }
    with place.noted(whole=True), editing(everyone, edits, whole=True):
        yield place.edited
    if not all(edit.found for edit in edits.values()):
        raise InterventionError("no forward pass held a token whose direction could be taken.")
    warn_of(place.edited, f"the {' and '.join(of)} of layer {at}")


class _Projection:
    """The edit of one site; remembers each row's direction from the chunk that held the token."""

    def __init__(self, view: HeadView, source: Place, *, itself: bool, strength: float) -> None:
        self.view, self.source, self.itself, self.strength = view, source, itself, strength
        self.directions: Tensor | None = None
        self.found = False

    def __call__(self, x: Tensor, chosen: TokenMask, now: PassTokens) -> Tensor:
        """New rows of every real token."""
        by_head = self.view.by_head(x)
        marked = self.source.marked(now)[0].to(x.device)
        self._learn(by_head, marked, now)
        assert self.directions is not None
        along = einsum(by_head, self.directions, "b h p d, b h d -> b h p")
        out = by_head - along[..., None] * self.directions[:, :, None]
        made = rearrange(
            blend(by_head, out, self.strength), f"batch head pos d -> {self.view.layout}"
        )
        if not self.itself:
            made[marked] = x[marked]
        if not self.source.edited.changed:  # as the model will hold it
            dtype = residual_dtype(self.source.model)
            same = torch.equal(made[chosen].to(dtype), x[chosen].to(dtype))
            self.source.edited.changed = not same
        return made[chosen]

    def _learn(self, x: Float[Tensor, "b h p d"], marked: TokenMask, now: PassTokens) -> None:
        here = marked.sum(dim=1)
        if (now.positions == 0).any():  # a new prefill: what was kept is of another text
            self.directions = None
        if (here > 1).any():
            raise InterventionError(
                "a sequence holds several chosen tokens, so there is not one direction to remove; "
                "choose one of them, e.g. tokens='first'."
            )
        if here.all():
            rows = x[torch.arange(len(x)), :, marked.int().argmax(dim=1)]
            self.directions = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-30)
            self.found = True
        elif here.any() or self.directions is None or len(self.directions) != len(x):
            raise InterventionError(
                "some sequence does not hold the chosen token, or its prefill was not seen, so it "
                "has no direction to remove."
            )


MASK = "attention_mask"


@intervention("drop_key", neutral={"strength": 0.0}, strong={})
@contextmanager
def drop_key(
    model: HookedModel,
    layer: int | MELayer | None = None,
    *,
    layers: Layers = "after",
    strength: float = 1.0,
    tokens: Tokens = None,
    start: int = 0,
) -> Iterator[EditedTokens]:
    """Hide the sink token's key and value from every later token; the token still sees itself.

    Args:    layer, layers, tokens: as for ``wemask``; a bridge or a plain transformers model.
             strength: attention weights to the token are multiplied by 1 - strength before they
             are normalised: 0 changes nothing, 1 removes key and value.
             start: absolute position from which on queries miss the key; those before it see it,
             as they do before a cache evicts it.
    Raises:  InterventionError: settings; flash attention, whose mask is no matrix; at the end, if
             no pass held a chosen token. Beam search is exact for tokens of the prompt only.
    """
    if not 0 <= check_number("strength", strength, low=0.0) <= 1:
        raise InterventionError(f"strength must be from 0 to 1, got {brief(strength, 40)}.")
    if (since := as_index(start)) is None or since < 0:
        raise InterventionError(f"start must be a position from 0 on, got {brief(start, 40)}.")
    decoder = decoder_of(model)
    require_located_here(decoder, layer, tokens)
    at = layers_of(decoder, layer, layers)
    place = Place.at(decoder.model, at[0], layer, tokens, known=at[0] - 1, blocks=decoder.blocks)
    hidden = _Hidden(place)
    amount = math.log1p(-strength) if strength < 1 else -math.inf

    def make(layer: int) -> PreHook:
        def edit(module: torch.nn.Module, args: Args, kwargs: Kwargs) -> Called:
            now = pass_of(decoder.model)
            columns = hidden.columns(now)
            if strength == 0 or not columns.any():
                return None
            hide = _hidden_from(columns, now.positions >= since)
            if not hide.any():
                return None
            place.edited.changed = True
            made = _with_hidden(kwargs.get(MASK), hide, amount, _dtype(args, kwargs))
            return args, {**kwargs, MASK: made}

        return edit

    with before_modules(place, {n: decoder.inputs[n] for n in at}, make, whole=True) as edited:
        yield edited


class _Hidden:
    """Which of all keys are hidden, chunk after chunk of one text."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._now: PassTokens | None = None
        self._columns: Tensor | None = None

    def columns(self, now: PassTokens) -> Bool[Tensor, "batch key"]:
        """Hidden keys of a pass, cached ones included."""
        assert now.keys is not None
        if now is self._now and self._columns is not None:
            return self._columns
        marked, _ = self.place.marked(now)
        past = now.keys.shape[1] - marked.shape[1]
        before = marked.new_zeros(len(marked), past)
        if past:
            if self._columns is None or len(self._columns) != len(marked):
                raise InterventionError(
                    "cached tokens were not seen while drop_key was open; enter it before the "
                    "prompt is run."
                )
            kept = self._columns[:, :past]
            before[:, : kept.shape[1]] = kept
        self._now, self._columns = now, torch.cat([before, marked], dim=1)
        return self._columns


def _dtype(args: Args, kwargs: Kwargs) -> torch.dtype:
    return (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).dtype


def _hidden_from(columns: Tensor, late: Tensor) -> Bool[Tensor, "batch 1 query key"]:
    """What is hidden from whom: a key from late queries behind it."""
    late = late.to(columns.device)  # positions are where the tokens went in
    total, chunk = columns.shape[1], late.shape[1]
    query = torch.arange(total - chunk, total, device=columns.device)
    key = torch.arange(total, device=columns.device)
    return columns[:, None, None, :] & (key[None] < query[:, None]) & late[:, None, :, None]


def _with_hidden(mask: object, hide: Tensor, amount: float, dtype: torch.dtype) -> Tensor:
    """The layer's mask, additive, lowered where a key is hidden."""
    chunk, total = hide.shape[2:]
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 4):
        raise InterventionError(
            "drop_key needs eager or sdpa attention (a mask of queries x keys); load the model "
            "with attn_implementation='eager'."
        )
    low = torch.finfo(dtype).min
    if mask is None:
        query = torch.arange(total - chunk, total, device=hide.device)
        key = torch.arange(total, device=hide.device)
        seen = (key[None] <= query[:, None])[None, None]
        mask = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, low)
    hide, width = hide.to(mask.device), mask.shape[-1]
    if width < total:  # a sliding window's cache keeps the last keys only
        hide = hide[..., total - width :]
    hide = torch.nn.functional.pad(hide, (0, width - hide.shape[-1]))
    if mask.dtype == torch.bool:
        if _true_is_hidden(mask, min(total, width)):
            if amount > -math.inf:
                raise InterventionError(
                    "this model's attention takes a mask of yes and no, so a key cannot be hidden "
                    "in part; use strength=1 (or 0)."
                )
            return mask | hide
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, low)
    lowered = mask + amount if amount > -math.inf else torch.full_like(mask, low)
    return torch.where(hide, lowered.clamp_min(low), mask)


def _true_is_hidden(mask: Tensor, seen: int) -> bool:
    """Whether True takes a key away (MPT) or lets it be read (sdpa): the last token of a text sees
    itself, so at its own key the mask says which; padding sees nothing or everything.
    """  # noqa: D205
    own = torch.arange(seen - mask.shape[-2], seen, device=mask.device)
    queries = torch.arange(mask.shape[-2], device=mask.device)
    later = own[None] > own[:, None]
    if later.any():  # a query never sees a later key: no padding disturbs that
        return bool(mask[..., queries[:, None], own[None]][..., later].all())
    return not bool(mask[..., queries, own].any())
