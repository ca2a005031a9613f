"""Stages: stretches of layers over which a token stays large, and where each is erased."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from melens.locating.thresholds import ERASED_LEFT, NORM_RATIO, last_body_layer
from melens.locating.trajectory import Path


@dataclass(frozen=True)
class Span:
    """One stage: first layer, layer of its largest norm, layer that erased it (or None)."""

    start: int
    peak: int
    erased_at: int | None


def spans(path: Path, ratios: Tensor) -> list[Span]:
    """The token's stages, in order. Growth that begins in the final window is not a stage.

    Args:    ratios: norm over the median token norm, by step (embedding first).
    """
    norms = path.norms[1:].tolist()
    last = last_body_layer(path.n_layers)
    heavy = (ratios[1 : last + 2] >= NORM_RATIO).tolist()
    found: list[Span] = []
    start, peak = 0, 0
    for layer, norm in enumerate(norms):
        if norm > norms[peak] and layer <= last:
            peak = layer
        elif norm < ERASED_LEFT * norms[peak]:
            if _is_stage(found, start, peak, heavy[start : layer + 1]):
                found.append(Span(start, peak, layer))
            start = peak = layer
    if _is_stage(found, start, peak, heavy[start:]):
        found.append(Span(start, peak, None))
    return found


def _is_stage(before: list[Span], start: int, peak: int, heavy: list[bool]) -> bool:
    """A heavy stretch; after an erasure it must have grown again, or it is what was left over."""
    return any(heavy) and (not before or peak > start)


def counted_from(path: Path, ratios: Tensor) -> int:
    """First layer that counts towards what stays: the one after the last earlier erasure."""
    before = [
        span.erased_at
        for span in spans(path, ratios)
        if span.erased_at is not None and span.erased_at <= path.peak
    ]
    return max(before) + 1 if before else 0
