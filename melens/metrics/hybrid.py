"""A hybrid's rhythm: does the sink token peak before each full-attention layer, and stay between?

Layers count from 0 at the block output; a norm is the sink token's at that output.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

DRAWS = 2000
Statistic = Callable[[Sequence[float], Collection[int]], float | None]


def sink_spike_alignment(norms: Sequence[float], full: Collection[int]) -> float | None:
    """Share of full-attention layers before which the sink token's norm peaks, in [0, 1].

    Of the layers after the previous full-attention layer and before f, the largest norm is at
    f - 1. A full-attention layer with no layer between it and the previous one has no say.

    Args:    norms: the token's norm at every layer's output, residual units.
             full: the full-attention layers.
    Returns: None where no layer has a say.
    Source:  arXiv 2608.12149, there counted from 1.
    """
    spans = [list(range(a + 1, b)) for a, b in pairwise([-1, *sorted(full)]) if b > a + 1]
    peaks = [max(span, key=lambda layer: norms[layer]) == span[-1] for span in spans]
    return sum(peaks) / len(peaks) if peaks else None


def inter_spike_retention(norms: Sequence[float], full: Collection[int]) -> float | None:
    """How much of the sink token's norm stays between two neighbouring peaks, in [0, 1].

    The mean over neighbouring peaks (the layers right before full-attention layers), and over the
    layers without full attention between them, of min(1, norm there / the smaller peak).

    Returns: None with fewer than two peaks, or nothing between them.
    Source:  arXiv 2608.12149.
    """
    peaks = [layer - 1 for layer in sorted(full) if layer > 0]
    kept = [
        min(1.0, norms[layer] / max(min(norms[a], norms[b]), 1e-30))
        for a, b in pairwise(peaks)
        for layer in range(a + 1, b)
        if layer not in full
    ]
    return sum(kept) / len(kept) if kept else None


@dataclass(frozen=True)
class ShuffledPlaces:
    """What a statistic reads if as many full-attention layers stood at random places."""

    mean: float
    low: float
    high: float
    """The middle 95 % of the draws."""
    draws: int


def shuffled_places(
    statistic: Statistic, norms: Sequence[float], full: Collection[int], *, seed: int
) -> ShuffledPlaces | None:
    """The control of both measures: the same norms, the places of full attention drawn at random.

    A norm that only grows is aligned wherever full attention stands, and says nothing.

    Returns: None where no draw gives the statistic a value.
    """
    draw = random.Random(seed)
    layers = range(len(norms))
    found = [statistic(norms, set(draw.sample(layers, len(full)))) for _ in range(DRAWS)]
    values = sorted(value for value in found if value is not None)
    if not values:
        return None
    tail = round(0.025 * (len(values) - 1))
    return ShuffledPlaces(
        sum(values) / len(values), values[tail], values[len(values) - 1 - tail], len(values)
    )
