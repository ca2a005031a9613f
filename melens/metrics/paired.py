"""Weighted means over items, alone and paired, with bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from melens.metrics.bootstrap import LEAST, percentiles, resamples

Items = Float[Tensor, " item"]


@dataclass(frozen=True)
class Estimate:
    """A mean, and its 95 % interval; None where too few or equal items say nothing."""

    value: float
    interval: tuple[float, float] | None


def weighted_mean(values: Items, weights: Items, *, seed: int = 0) -> Estimate:
    """sum(w x) / sum(w) over items, items drawn with replacement for the interval.

    With x a mean loss a token and w the item's number of tokens this is the loss of all tokens
    together, and the interval still is one over items, whose tokens are not independent.

    Source:  Efron & Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3.
    """
    values, weights = values.double().cpu(), weights.double().cpu()
    value = float((values * weights).sum() / weights.sum())
    if len(values) < LEAST or bool((values == values[0]).all()):
        return Estimate(value, None)
    drawn = resamples(len(values), seed=seed)
    means = (values * weights)[drawn].sum(1) / weights[drawn].sum(1).clamp_min(1e-300)
    return Estimate(value, percentiles(means))


def paired_difference(edited: Items, base: Items, weights: Items, *, seed: int = 0) -> Estimate:
    """Weighted mean of edited - base, item by item: what both share cancels.

    Raises:  nothing; the items must be the same, in the same order.
    """
    return weighted_mean(edited.double() - base.double(), weights, seed=seed)
