"""Weighted means over items, alone and paired, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb

import torch
from jaxtyping import Float
from torch import Tensor

from melens.metrics.bootstrap import LEAST, LEVEL, percentiles, resamples

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

    Where every item counts the same and can only flip (differences of -1, 0 and 1), the interval
    is exact: a bootstrap of a few flips to one side would leave zero out whatever their number.
    """
    apart = edited.double() - base.double()
    found = weighted_mean(apart, weights, seed=seed)
    flips = bool(torch.isin(apart, torch.tensor([-1.0, 0.0, 1.0]).double()).all())
    if found.interval is None or not flips or not bool((weights == weights[0]).all()):
        return found
    up, down = int((apart > 0).sum()), int((apart < 0).sum())
    return Estimate(found.value, _flip_interval(up, down, len(apart)))


def _flip_interval(up: int, down: int, items: int) -> tuple[float, float]:
    """The mean of flips, given how many items flipped: Clopper-Pearson on the share that went up.

    It leaves zero out exactly where the two-sided sign test (McNemar's exact test) does.

    Source:  Clopper & Pearson, Biometrika 26, 1934; Agresti, Categorical Data Analysis, 10.1.
    """
    flips, tail = up + down, (1 - LEVEL) / 2

    def at_least(share: float, count: int) -> float:
        return sum(
            comb(flips, k) * share**k * (1 - share) ** (flips - k) for k in range(count, flips + 1)
        )

    low = 0.0 if up == 0 else _solved(lambda p: at_least(p, up) - tail)
    high = 1.0 if down == 0 else _solved(lambda p: at_least(p, up + 1) - (1 - tail))
    return (2 * low - 1) * flips / items, (2 * high - 1) * flips / items


def _solved(rising: Callable[[float], float]) -> float:
    """Where a rising function of a share is zero, by halving."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
