"""Means over items and their intervals: the one bootstrap, and exact ones where they exist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from melens.formatting import Interval

LEVEL = 0.95
LEAST, RESAMPLES = 5, 2_000
"""Observations below which resampling says next to nothing: the interval of two values would be
the two values."""
LEAST_OF_MANY, RESAMPLES_OF_MANY = 20, 10_000
"""One of several comparisons is read off further out in the tails: more draws, and more items,
below which a percentile interval is too narrow for the rate that is promised."""
Items = Float[Tensor, " item"]


@dataclass(frozen=True)
class Estimate:
    """A mean, and its 95 % interval; None where too few or equal items say nothing."""

    value: float
    interval: Interval | None


def weighted_mean(
    values: Items, weights: Items, *, seed: int = 0, tests: int | None = None
) -> Estimate:
    """sum(w x) / sum(w) over items, items drawn with replacement for the interval.

    With x a mean loss a token and w the item's number of tokens this is the loss of all tokens
    together, and the interval still is one over items, whose tokens are not independent.

    Args:    tests: how many intervals hold their true means together with 95 %, whatever their
             dependence (Bonferroni: each is taken at 1 - 0.05 / tests); None = this one alone.
    Source:  Efron & Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3; Dunn,
             Multiple Comparisons among Means, JASA 56, 1961.
    """
    values, weights = values.double().cpu(), weights.double().cpu()
    value = float((values * weights).sum() / weights.sum())
    if bool((values == values[0]).all()):
        return Estimate(value, None)
    found = bootstrap(_weighted, values * weights, weights, seed=seed, tests=tests)
    return Estimate(value, found)


def _weighted(products: Tensor, weights: Tensor) -> Tensor:
    return products.sum(-1) / weights.sum(-1).clamp_min(1e-300)


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
    return Estimate(found.value, flip_interval(up, down, len(apart)))


def mean_interval(values: Items, *, seed: int = 0) -> Interval | None:
    """95 % percentile interval of a mean; paired differences go in as differences.

    Fewer than LEAST values, or equal ones, say nothing about others: None.
    """
    if len(values) < LEAST or bool((values == values[0]).all()):
        return None
    return bootstrap(_mean, values.double().cpu(), seed=seed)


def _mean(drawn: Tensor) -> Tensor:
    return drawn.mean(-1)


def bootstrap(
    statistic: Callable[..., Tensor], *items: Items, seed: int = 0, tests: int | None = None
) -> Interval | None:
    """Percentile interval of a statistic, items drawn with replacement.

    Args:    statistic: of the drawn items, ``[resample, item]`` each, over the last axis.
             items: one or several columns over the same items, which are drawn together.
             tests: how many such intervals are looked at together; None = this one alone.
    Returns: None with too few items.
    """
    least = LEAST if tests is None else LEAST_OF_MANY
    if len(items[0]) < least:
        return None
    drawn = resamples(len(items[0]), seed=seed, tests=tests)
    tail = (1 - LEVEL) / (tests or 1) / 2
    made = statistic(*(column[drawn] for column in items))
    low, high = made.quantile(torch.tensor([tail, 1 - tail], dtype=made.dtype))
    return float(low), float(high)


def resamples(
    count: int, *, seed: int = 0, tests: int | None = None
) -> Int[Tensor, "resample draw"]:
    """Indices of ``count`` observations, drawn with replacement."""
    rng = torch.Generator().manual_seed(seed)
    draws = RESAMPLES if tests is None else RESAMPLES_OF_MANY
    return torch.randint(count, (draws, count), generator=rng)


def random_order(count: int, *, seed: int) -> Int[Tensor, " draw"]:
    """0 to ``count - 1`` in an order that the seed alone decides."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def flip_interval(up: int, down: int, items: int) -> Interval:
    """The mean of flips, given how many items flipped: Clopper-Pearson on the share that went up.

    It leaves zero out exactly where the two-sided sign test (McNemar's exact test) does.

    Source:  Clopper & Pearson, Biometrika 26, 1934; Agresti, Categorical Data Analysis, 10.1.
    """
    flips = up + down
    low, high = _share(up, flips, "exact")
    return (2 * low - 1) * flips / items, (2 * high - 1) * flips / items


def wilson(hits: int, n: int) -> Interval:
    """95 % Wilson score interval of a share.

    Source:  Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    return _share(hits, n, "wilson")


def _share(hits: int, n: int, method: str) -> Interval:
    # Takes a second to import, and has no types.
    from scipy.stats import binomtest  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    found = binomtest(hits, n).proportion_ci(LEVEL, method=method)
    return float(found.low), float(found.high)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
