"""A hybrid's rhythm: does the sink token peak before each full-attention layer, and stay between?

Layers count from 0 at the block output; a norm is the sink token's at that output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

Statistic = Callable[[Sequence[float], Collection[int]], float | None]


def sink_spike_alignment(norms: Sequence[float], full: Collection[int]) -> float | None:
    """Share of full-attention layers before which the sink token's norm peaks, in [0, 1].

    Of the layers after the previous full-attention layer and before f, the largest norm is at
    f - 1. A full-attention layer with fewer than two layers there is left out: one layer is always
    the largest of one.

    Args:    norms: the token's norm at every layer's output, residual units.
             full: the full-attention layers.
    Returns: None where every layer is left out.
    Source:  arXiv 2608.12149, there counted from 1 and with spans of one layer.
    """
    spans = [range(a + 1, b) for a, b in pairwise([-1, *sorted(full)]) if b > a + 2]
    peaks = [max(span, key=lambda layer: norms[layer]) == span[-1] for span in spans]
    return sum(peaks) / len(peaks) if peaks else None


def inter_spike_retention(norms: Sequence[float], full: Collection[int]) -> float | None:
    """How much of the sink token's norm stays between two neighbouring peaks, in [0, 1].

    The mean over neighbouring peaks (the layers right before full-attention layers), and over the
    layers without full attention between them, of min(1, norm there / the smaller peak).

    Args:    norms, full: as :func:`sink_spike_alignment`.
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
class ShiftedPlaces:
    """What a statistic reads if the full-attention layers stood elsewhere, as far apart."""

    mean: float
    low: float
    high: float
    """The smallest and the largest."""
    shifts: int
    """How many placements were tried."""


def shifted_places(
    statistic: Statistic, norms: Sequence[float], full: Collection[int]
) -> ShiftedPlaces | None:
    """The control of both measures: the same norms, all full-attention layers moved on by 1, 2, ...

    What leaves at the last layer comes in at the first. Distances stay what they are, so that on
    norms without a rhythm value and control agree. A norm that only grows is as aligned at every
    place. Shifts that put the layers where others stood are left out.

    Args:    norms, full: as :func:`sink_spike_alignment`.
    Returns: None where no shift gives the statistic a value.
    """
    n, places = len(norms), frozenset(full)
    moved = {frozenset((layer + by) % n for layer in full) for by in range(1, n)} - {places}
    found = [statistic(norms, there) for there in sorted(moved, key=sorted)]
    values = [value for value in found if value is not None]
    if not values:
        return None
    return ShiftedPlaces(sum(values) / len(values), min(values), max(values), len(values))
