"""Intervals of several confirmed settings at once."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from melens.metrics.bootstrap import LEVEL

DRAWS = 10_000
"""More than a 95 % interval needs: a corrected one is read off far out in the tails."""


def corrected_interval(
    differences: Float[Tensor, " item"],
    weights: Float[Tensor, " item"],
    *,
    tests: int,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile interval of a weighted mean, widened so that ``tests`` of them hold together.

    Bonferroni: each is taken at 1 - 0.05 / tests, so that all of them hold their true means with
    95 %, whatever the dependence between settings; one side alone errs half as often. The
    percentile interval itself is a little narrow: with 20 items about as if the normal quantile
    stood for Student's, which the unused side makes up for (tests measure the rate).

    Args:    differences: edited - base, items in one order.
    Returns: None where all differences are equal: they say nothing about others.
    Source:  Efron & Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3; Dunn,
             Multiple Comparisons among Means, JASA 56, 1961 (Bonferroni's inequality).
    """
    x, w = differences.double().cpu(), weights.double().cpu()
    if bool((x == x[0]).all()):
        return None
    rng = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(x), (DRAWS, len(x)), generator=rng)
    means = (x * w)[drawn].sum(1) / w[drawn].sum(1)
    tail = (1 - LEVEL) / tests / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.double)).tolist()
    return low, high
