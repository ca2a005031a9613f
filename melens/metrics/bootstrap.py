"""Percentile bootstrap intervals of a mean over sequences."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

RESAMPLES = 2000
LEVEL = 0.95
LEAST = 5
"""Observations below which resampling them says next to nothing: the interval of two values would
be the two values."""


def mean_interval(
    values: Float[Tensor, " sequence"], *, seed: int = 0
) -> tuple[float, float] | None:
    """95 % percentile interval of the mean, sequences drawn with replacement.

    Paired differences go in as differences. Fewer than LEAST values, or equal ones, say nothing
    about others: None.

    Source:  Efron & Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3.
    """
    if len(values) < LEAST or bool((values == values[0]).all()):
        return None
    return percentiles(values.double().cpu()[resamples(len(values), seed=seed)].mean(dim=1))


def resamples(count: int, *, seed: int = 0) -> Int[Tensor, "resample draw"]:
    """Indices of ``count`` observations, drawn with replacement, RESAMPLES times."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(count, (RESAMPLES, count), generator=rng)


def percentiles(values: Float[Tensor, " resample"]) -> tuple[float, float]:
    """The middle 95 % of resampled values."""
    low, high = values.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2]).double()).tolist()
    return low, high
