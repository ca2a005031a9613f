"""Which tokens an edit touches, and whether a located ME Layer is of the model it is used on."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from melens.errors import InterventionError, ResultError
from melens.interventions.context import PassTokens
from melens.interventions.massive import FirstRule, IdRule, MassiveRule
from melens.models.anatomy import residual_dtype
from melens.models.decoder import Decoder
from melens.models.origin import fingerprint, origin_of
from melens.protocols import HookedModel
from melens.results.locate import MELayer
from melens.shapes import TokenMask

_HELD: weakref.WeakKeyDictionary[object, set[str]] = weakref.WeakKeyDictionary()
"""Weights that a model was found to have: an edit is entered again for every batch."""


def _require_weights(me_layer: MELayer, model: HookedModel, weights: str | None) -> None:
    if me_layer.run.weights != weights:
        raise ResultError(
            f"this ME Layer was located on {me_layer.run.model} in {me_layer.run.dtype} (weights "
            f"{me_layer.run.weights}), the model at hand has weights {weights} in "
            f"{residual_dtype(model)} ({origin_of(model).name}); locate it again."
        )


def require_room(
    me_layer: MELayer, *, n_layers: int, d_model: int, name: str | None = None
) -> None:
    """Refuse an ME Layer of a deeper, flatter or wider model.

    Args:    name: of a model whose weights were not compared; None = they are the same.
    Raises:  ResultError: with the sizes of both.
    """
    dims = [token.dim for token in me_layer.massive]
    if me_layer.n_layers == n_layers and all(0 <= dim < d_model for dim in dims):
        return
    located = "" if name is None else f" was located on {me_layer.run.model}: it"
    here = "the model" if name is None else f"the {name} at hand"
    way_out = "locate it again" if name else "the file was edited: locate again"
    raise ResultError(
        f"this ME Layer{located} has {me_layer.n_layers} layers and dimensions {dims[:4]}, {here} "
        f"{n_layers} layers and d_model {d_model}; {way_out}."
    )


def note_weights(model: HookedModel, weights: str | None) -> None:
    """Take a hooked model's weights as known: measured now, or told by an export's own check.

    What was located on an object stays good for it while it is trained or given an adapter.
    """
    if weights is not None:
        _HELD.setdefault(model, set()).add(weights)


def require_located_here(model: HookedModel | Decoder, *given: object) -> None:
    """What an edit asks first: are the ME Layers among ``given`` of this model?

    Weights are compared once for each hooked model and ME Layer; for a plain ``Decoder``, which
    names its weights otherwise, the sizes are.

    Raises:  ResultError: naming both.
    """
    for me_layer in given:
        if not isinstance(me_layer, MELayer):
            continue
        if isinstance(model, Decoder) and not hasattr(model.model, "hook_dict"):
            require_room(me_layer, n_layers=model.n_layers, d_model=model.d_model, name=model.name)
            continue
        hooked = model.model if isinstance(model, Decoder) else model
        if me_layer.run.weights not in _HELD.get(hooked, ()):
            weights = fingerprint(hooked)
            _require_weights(me_layer, hooked, weights)
            note_weights(hooked, weights)
        require_room(me_layer, n_layers=hooked.cfg.n_layers, d_model=hooked.cfg.d_model)


Choice = Callable[[PassTokens], TokenMask]
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
    """
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

    def choose(now: PassTokens) -> TokenMask:
        assert now.positions.shape == marks.shape, "a pass of another batch"
        return marks.to(now.positions.device)

    return choose


def meant(layer: object, tokens: Tokens) -> Tokens:
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
