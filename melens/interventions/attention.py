"""Edits of queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from melens.errors import InterventionError
from melens.interventions.context import Now
from melens.interventions.core import (
    Place,
    blend,
    check_number,
    editing,
    intervention,
    warn_of,
)
from melens.interventions.edited import EditedTokens
from melens.interventions.tokens import Tokens
from melens.models.attention import View, attention_sites
from melens.results.locate import MELayer
from melens.shapes import TokenMask

SITES = ("q", "k")


@intervention("qk_orthogonalise", neutral={"strength": 0.0}, strong={})
@contextmanager
def qk_orthogonalise(
    model: Any,
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
    """  # fmt: skip
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
        place.edited.changed = everyone.edited.changed
    if not all(edit.found for edit in edits.values()):
        raise InterventionError("no forward pass held a token whose direction could be taken.")
    warn_of(place.edited, f"the {' and '.join(of)} of layer {at}")


class _Projection:
    """The edit of one site; remembers each row's direction from the chunk that held the token."""

    def __init__(self, view: View, source: Place, *, itself: bool, strength: float) -> None:
        self.view, self.source, self.itself, self.strength = view, source, itself, strength
        self.directions: Tensor | None = None
        self.found = False

    def __call__(self, x: Tensor, chosen: TokenMask, now: Now) -> Tensor:
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
        return made[chosen]

    def _learn(self, x: Float[Tensor, "b h p d"], marked: TokenMask, now: Now) -> None:
        here = marked.sum(dim=1)
        if (now.positions == 0).any():  # a new prefill: what was kept is of another text
            self.directions = None
        if (here > 1).any():
            raise InterventionError(
                "a sequence holds several chosen tokens, so there is no one direction to take out; "
                "choose one of them, e.g. tokens='first'."
            )
        if here.all():
            rows = x[torch.arange(len(x)), :, marked.int().argmax(dim=1)]
            self.directions = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-30)
            self.found = True
        elif here.any() or self.directions is None or len(self.directions) != len(x):
            raise InterventionError(
                "some sequence does not hold the chosen token, or its prefill was not seen, so it "
                "has no direction to take out."
            )
