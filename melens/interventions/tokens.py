"""Which tokens an edit touches: always by absolute position or id, never by index in a chunk."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch

from melens.errors import InterventionError
from melens.interventions.now import Now
from melens.results.locate import MELayer
from melens.shapes import TokenMask

Choice = Callable[[Now], TokenMask]
Tokens = MELayer | str | int | Iterable[int] | Choice | None
"""A located ME Layer (its massive tokens of the primary dimension), ``"first"``, ``"all"``,
absolute positions, or a rule of one's own: a function of what a pass looks at (ids and positions,
``[batch, chunk]``)."""


def choice_of(tokens: Tokens) -> Choice:
    """The rule that marks tokens, ``[batch, chunk]``.

    Raises:  InterventionError: something else, or a ME Layer without any massive token.
    """
    if isinstance(tokens, MELayer):
        return _located(tokens)
    if callable(tokens):
        return tokens
    if tokens == "first":
        return lambda now: now.positions == 0
    if tokens == "all":
        return lambda now: now.real
    positions = _positions(tokens)
    if positions:
        wanted = torch.tensor(positions)
        return lambda now: torch.isin(now.positions, wanted.to(now.positions.device))
    raise InterventionError(
        f"tokens must be what melens.locate returns, 'first', 'all', absolute positions from 0 "
        f"or a function, got {tokens!r:.60}."
    )


def _positions(tokens: Any) -> list[int] | None:
    """Absolute positions, in whatever they come; None where they are no such thing."""
    if isinstance(tokens, (str, bool, dict)) or tokens is None:
        return None
    try:
        found = [operator.index(tokens)]
    except TypeError:
        try:
            found = [operator.index(item) for item in tokens]
        except TypeError:
            return None
    return sorted(set(found)) if all(position >= 0 for position in found) else None


def _located(me_layer: MELayer) -> Choice:
    """Massive first tokens where they come first, later ones wherever their id comes.

    Those of the primary dimension: what is massive in another one has another cause. Where every
    first token that ``locate`` tried alone turned massive, any first token counts.
    """
    if not me_layer.massive:
        raise InterventionError(
            f"{me_layer.run.model} has no massive token to edit; say which tokens: 'first', 'all' "
            "or positions."
        )
    tokens = [token for token in me_layer.massive if token.dim == me_layer.massive[0].dim]
    first = torch.tensor([token.token_id for token in tokens if token.position == 0])
    later = torch.tensor([token.token_id for token in tokens if token.position > 0])
    tried = me_layer.stability.first_tokens
    any_first = bool(len(first) and tried) and all(token.massive for token in tried)

    def choose(now: Now) -> TokenMask:
        start = now.positions == 0
        if any_first and not len(later):
            return start
        if now.ids is None:
            raise InterventionError(
                "these massive tokens are told by their ids, and the model was called with "
                "embeddings; pass tokens='first' or positions."
            )
        ids = now.ids
        marked = start if any_first else start & torch.isin(ids, first.to(ids.device))
        return marked | ((now.positions > 0) & torch.isin(ids, later.to(ids.device)))

    return choose
