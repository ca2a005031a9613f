"""Percentile bootstrap intervals of a mean over sequences."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

RESAMPLES = 2000
LEVEL = 0.95


def mean_interval(
    values: Float[Tensor, " sequence"], *, seed: int = 0
) -> tuple[float, float] | None:
    """95 % percentile interval of the mean, sequences drawn with replacement.

    Paired differences go in as differences. One value, or equal values, say nothing about others:
    None.

    Source:  Efron & Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3.
    """
    if len(values) < 2 or bool((values == values[0]).all()):
        return None
    rng = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(values), (RESAMPLES, len(values)), generator=rng)
    means = values.double().cpu()[draws].mean(dim=1)
    low, high = means.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2]).double()).tolist()
    return low, high
