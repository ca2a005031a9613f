"""Edits of a norm's gain: what it does to the massive token's way into the FFN, or out of it.

``norm`` names which one: ``ln2`` before the FFN (the default), ``ln2_post`` after it where a model
has one (Gemma-2/3, OLMo-2), ``ln1`` and ``ln1_post`` around attention.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from melens.errors import InterventionError
from melens.formatting import brief
from melens.intervals import random_order
from melens.interventions.context import PassTokens
from melens.interventions.core import (
    EditedTokens,
    Place,
    blend,
    check_indices,
    check_number,
    editing,
    intervention,
)
from melens.interventions.target import Tokens
from melens.models.anatomy import norm_gain
from melens.protocols import HookedModel
from melens.results.locate import MELayer
from melens.shapes import TokenMask

Gain = Float[Tensor, "token d_model"]
_GAINS: weakref.WeakKeyDictionary[object, dict[tuple[int, str], Tensor]] = (
    weakref.WeakKeyDictionary()
)


@intervention("norm_flatten", neutral={"alpha": 1.0}, strong={"alpha": 0.0})
@contextmanager
def norm_flatten(
    model: HookedModel,
    layer: int | MELayer,
    *,
    tokens: Tokens = None,
    norm: str = "ln2",
    alpha: float = 0.0,
) -> Iterator[EditedTokens]:
    """Pull a norm's gain towards its mean: gamma_eff = mean + alpha (gamma - mean).

    Args:    layer: a layer counted from 0, or a located ME Layer.
             tokens: see ``melens.interventions``; None = the located massive tokens, or the first
             token where ``layer`` is a number.
             alpha: 1 changes nothing, 0 is a flat norm.
    Raises:  SiteError: no such layer or norm. FoldedWeightsError: the gain was folded away.
             InterventionError: bad tokens or alpha; at the end, if nothing was edited.
    Source:  the ME-Layer authors' released code, ablation R1.
    """
    check_number("alpha", alpha)
    with _regained(model, layer, tokens, norm, lambda gain: _flat(gain, alpha)) as edited:
        yield edited


def _flat(gain: Gain, alpha: float) -> Gain:
    return blend(gain.mean(dim=-1, keepdim=True).expand_as(gain), gain, alpha)


@intervention(
    "norm_scale_dims", neutral={"dims": [0], "factor": 1.0}, strong={"dims": [0, 3], "factor": 9.0}
)
@contextmanager
def norm_scale_dims(
    model: HookedModel,
    layer: int | MELayer,
    *,
    dims: Sequence[int],
    tokens: Tokens = None,
    norm: str = "ln2",
    factor: float = 0.0,
) -> Iterator[EditedTokens]:
    """Multiply a norm's gain in chosen residual dimensions; 1 changes nothing.

    Raises:  InterventionError: dims outside the residual stream; else as ``norm_flatten``.
    """
    check_number("factor", factor)

    def scaled(gain: Gain) -> Gain:
        wanted = check_indices("dims", dims, gain.shape[-1], what="the residual's dimensions")
        made = gain.clone()
        made[:, wanted] *= factor
        return made

    with _regained(model, layer, tokens, norm, scaled) as edited:
        yield edited


@intervention("norm_ones", neutral={"strength": 0.0}, strong={})
@contextmanager
def norm_ones(
    model: HookedModel,
    layer: int | MELayer,
    *,
    tokens: Tokens = None,
    norm: str = "ln2",
    strength: float = 1.0,
) -> Iterator[EditedTokens]:
    """Set every gain of a norm to 1: neither its shape nor its overall scale is left.

    A gated FFN multiplies the scale twice, so this says more of size than of shape.

    Args:    strength: 0 changes nothing, 1 is a gain of ones.
    """
    check_number("strength", strength)
    with _regained(
        model, layer, tokens, norm, lambda g: blend(g, torch.ones_like(g), strength)
    ) as edited:
        yield edited


@intervention("norm_shuffle", neutral={"seed": 0, "strength": 0.0}, strong={"seed": 0})
@contextmanager
def norm_shuffle(
    model: HookedModel,
    layer: int | MELayer,
    *,
    seed: int,
    tokens: Tokens = None,
    norm: str = "ln2",
    strength: float = 1.0,
) -> Iterator[EditedTokens]:
    """Shuffle a norm's gain over the dimensions: its values stay, their places do not.

    Args:    strength: 0 changes nothing, 1 is the shuffled gain.
    """
    check_number("strength", strength)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise InterventionError(f"seed must be a whole number, got {brief(seed, 40)}.")

    def shuffled(gain: Gain) -> Gain:
        order = random_order(gain.shape[-1], seed=seed)
        return blend(gain, gain[:, order.to(gain.device)], strength)

    with _regained(model, layer, tokens, norm, shuffled) as edited:
        yield edited


def _regained(
    model: HookedModel,
    layer: int | MELayer,
    tokens: Tokens,
    norm: str,
    change: Callable[[Gain], Gain],
) -> AbstractContextManager[EditedTokens]:
    """Give the chosen tokens another gain; the rest of the norm, a bias included, stays."""
    place = Place.of(model, layer, tokens)
    gain = norm_gain(model, place.layer, norm)
    change(gain[None])
    normalized: list[Tensor] = []
    # Edits of one norm share the gains of the running pass, so that each changes what the one
    # before it left.
    shared = _GAINS.setdefault(model, {})
    where = place.layer, norm

    def keep(x: Tensor) -> None:
        normalized[:] = [x]
        shared.pop(where, None)

    def edit(x: Tensor, chosen: TokenMask, now: PassTokens) -> Tensor:
        if where not in shared:
            shared[where] = gain.to(x.device).expand(x.shape).clone()
        old = shared[where][chosen]
        new = shared[where][chosen] = change(old)
        if torch.equal(new, old):
            return x[chosen]
        # Added, not multiplied: a gain of zero could not be undone by a factor.
        return x[chosen] + normalized[0][chosen].to(x.dtype) * (new - old).to(x.dtype)

    sites = place.hook(f"{norm}.hook_normalized"), place.hook(f"{norm}.hook_out")
    return editing(place, {sites[1]: edit}, reads={sites[0]: keep})
