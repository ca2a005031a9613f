"""Whether a located ME Layer is of the model that it is used on."""

from __future__ import annotations

import weakref
from typing import Any

from melens.errors import ResultError
from melens.models.anatomy import residual_dtype
from melens.models.decoder import Decoder
from melens.models.origin import fingerprint, origin_of
from melens.results.locate import MELayer

_HELD: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()
"""Weights that a model was found to have: an edit is entered anew for every batch."""


def require_weights(me_layer: MELayer, model: Any, weights: str | None) -> None:
    """Refuse an ME Layer of other weights, or one that the model has no room for.

    Args:    weights: the ``fingerprint`` of the hooked ``model``.
    Raises:  ResultError: naming both models.
    """
    if me_layer.run.weights != weights:
        raise ResultError(
            f"this ME Layer was located on {me_layer.run.model} in {me_layer.run.dtype} (weights "
            f"{me_layer.run.weights}), the model at hand has weights {weights} in "
            f"{residual_dtype(model)} ({origin_of(model).name}); locate it again."
        )
    require_room(me_layer, n_layers=model.cfg.n_layers, d_model=model.cfg.d_model)


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


def note_weights(model: Any, weights: str | None) -> None:
    """Take a hooked model's weights as known: measured now, or told by an export's own check.

    What was located on an object stays good for it while it is trained or given an adapter.
    """
    if weights is not None:
        _HELD.setdefault(model, set()).add(weights)


def require_located_here(model: Any, *given: Any) -> None:
    """What an edit asks first: are the ME Layers among ``given`` of this model?

    Weights are compared once for each hooked model and ME Layer; for a plain ``Decoder``, which
    names its weights otherwise, the sizes are.

    Raises:  ResultError: naming both.
    """
    for me_layer in given:
        if not isinstance(me_layer, MELayer):
            continue
        if isinstance(model, Decoder) and not hasattr(model.model, "hook_dict"):
            require_room(
                me_layer, n_layers=model.n_layers, d_model=model.d_model, name=model.name
            )  # fmt: skip
            continue
        hooked = model.model if isinstance(model, Decoder) else model
        if me_layer.run.weights not in _HELD.get(hooked, ()):
            weights = fingerprint(hooked)
            require_weights(me_layer, hooked, weights)
            note_weights(hooked, weights)
        require_room(me_layer, n_layers=hooked.cfg.n_layers, d_model=hooked.cfg.d_model)
