"""Which tokens an edit touches: by what the pass shows of them or by absolute position, never by
index in a chunk.
"""  # noqa: D205

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch

from melens.errors import InterventionError
from melens.interventions.context import Now
from melens.interventions.massive import FirstRule, IdRule, MassiveRule
from melens.results.locate import MELayer
from melens.shapes import TokenMask

Choice = Callable[[Now], TokenMask]
Tokens = MELayer | str | int | Iterable[int] | Choice | None
"""A located ME Layer: its massive tokens, told by the residual at its output. Where the edit acts
before that, its massive first tokens. ``"first"``, ``"all"``, absolute positions, or a rule of
one's own: a function of what a pass looks at (ids and positions, ``[batch, chunk]``). ``"ids"``
beside a located layer: its ids wherever they stand, massive there or not."""


def choice_of(tokens: Tokens, *, known: int | None = None) -> Choice:
    """The rule that marks tokens, ``[batch, chunk]``.

    Args:    known: the last layer, from 0, whose output the edit comes after; -1 the embedding,
             None = not even that.
    Raises:  InterventionError: something else, or a ME Layer without any massive token.
    """  # fmt: skip
    if isinstance(tokens, MELayer):
        rule = MassiveRule.of(tokens)
        return rule if known is not None and rule.layer <= known else FirstRule.of(tokens)
    if callable(tokens):
        return tokens
    if isinstance(tokens, str) and tokens == "first":
        return lambda now: now.positions == 0
    if isinstance(tokens, str) and tokens == "all":
        return lambda now: now.real
    positions = _positions(tokens)
    if positions:
        wanted = torch.tensor(positions)
        return lambda now: torch.isin(now.positions, wanted.to(now.positions.device))
    raise InterventionError(
        f"tokens must be what melens.locate returns, 'first', 'all', absolute positions from 0 "
        f"or a function, got {tokens!r:.60}."
    )


def these(marks: TokenMask) -> Choice:
    """Exactly these tokens of one batch, in passes that hold the whole of it once."""

    def choose(now: Now) -> TokenMask:
        assert now.positions.shape == marks.shape, "a pass of another batch"
        return marks.to(now.positions.device)

    return choose


def meant(layer: Any, tokens: Tokens) -> Tokens:
    """The tokens that an edit's ``layer`` and ``tokens`` mean together.

    Raises:  InterventionError: "ids" without a located layer.
    """
    if tokens is None:
        return layer if isinstance(layer, MELayer) else "first"
    if isinstance(tokens, str) and tokens == "ids":
        if not isinstance(layer, MELayer):
            raise InterventionError(
                "tokens='ids' means the ids of a located ME Layer; pass what melens.locate returns "
                "as the layer."
            )
        return IdRule.of(layer)
    return tokens


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
