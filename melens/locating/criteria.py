"""Every criterion in use, side by side, and the stages they count by: functions of the evidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from melens.locating.profile import SequenceRow, first_layer
from melens.locating.thresholds import (
    DIRECTION_COSINE,
    ERASED_LEFT,
    FIRST_SHARE,
    last_body_layer,
)
from melens.locating.trajectory import Path
from melens.metrics.magnitude import NORM_RATIO
from melens.registry import Registry


@dataclass(frozen=True)
class StageSpan:
    """One stage: first layer, layer of its largest norm, layer that erased it (or None)."""

    start: int
    peak: int
    erased_at: int | None


def spans(path: Path, ratios: Tensor) -> list[StageSpan]:
    """The token's stages, in order. Growth that begins in the final window is not a stage.

    Args:    ratios: norm over the median token norm, by step (embedding first).
    """
    norms = path.norms[1:].tolist()
    last = last_body_layer(path.n_layers)
    heavy = (ratios[1 : last + 2] >= NORM_RATIO).tolist()
    found: list[StageSpan] = []
    start, peak = 0, 0
    for layer, norm in enumerate(norms):
        if norm > norms[peak] and layer <= last:
            peak = layer
        elif norm < ERASED_LEFT * norms[peak]:
            if _is_stage(found, start, peak, heavy[start : layer + 1]):
                found.append(StageSpan(start, peak, layer))
            start = peak = layer
    if _is_stage(found, start, peak, heavy[start:]):
        found.append(StageSpan(start, peak, None))
    return found


def _is_stage(before: list[StageSpan], start: int, peak: int, heavy: list[bool]) -> bool:
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


@dataclass(frozen=True)
class Evidence:
    """What was measured. ``steps`` index: 0 = the embedding, l + 1 = the output of layer l."""

    steps: Sequence[Sequence[SequenceRow]]
    path: Path | None
    """The primary massive token's trajectory; None where no token is massive."""

    @property
    def layers(self) -> Sequence[Sequence[SequenceRow]]:
        """Rows by layer."""
        return self.steps[1:]

    def norm_ratios(self, path: Path) -> Tensor:
        """The token's norm over the mean of the median token norms, by step."""
        return path.norms / torch.tensor([_mean(rows, "median_norm") for rows in self.steps])


Criterion = Callable[[Evidence], int | None]
CRITERIA: Registry[Criterion] = Registry("criterion")


@CRITERIA.register("sun_layer")
def sun_layer(evidence: Evidence) -> int | None:
    """First layer with some |x| > 100 and > 1000 x the layer-wide median; most frequent answer
    over the sequences (Sun et al. 2024, section 2).
    """  # noqa: D205
    return _most_frequent(evidence, "sun")


@CRITERIA.register("sun_token")
def sun_token(evidence: Evidence) -> int | None:
    """The same with the token's own median."""
    return _most_frequent(evidence, "sun_own")


@CRITERIA.register("ratio_jump")
def ratio_jump(evidence: Evidence) -> int | None:
    """Largest r[l] / r[l-1], r = token norm over the median token norm."""
    if evidence.path is None:
        return None
    ratios = evidence.norm_ratios(evidence.path)
    return int((ratios[1:] / ratios[:-1]).argmax())


@CRITERIA.register("max_jump")
def max_jump(evidence: Evidence) -> int | None:
    """Largest growth factor of max |x| over the whole layer output; answers without a massive
    token too.
    """  # noqa: D205
    top = torch.tensor([max(row.max for row in rows) for rows in evidence.steps])
    return int((top[1:] / top[:-1]).argmax())


@CRITERIA.register("difference")
def difference(evidence: Evidence) -> int | None:
    """Largest increase of the token's norm."""
    return None if evidence.path is None else int(evidence.path.norms.diff().argmax())


@CRITERIA.register("first_share")
def first_share(evidence: Evidence) -> int | None:
    """The ME Layer: first layer where the cumulative write share, counted after any stage that
    was erased, passes a tenth. -1 = the embedding already holds that.
    """  # noqa: D205
    path = evidence.path
    return None if path is None else cumulative_layer(evidence, path, FIRST_SHARE)


@CRITERIA.register("write_share")
def write_share(evidence: Evidence) -> int | None:
    """The main step: largest share up to the peak, counted like the ME Layer."""
    path = evidence.path
    if path is None:
        return None
    start, shares = counted_shares(evidence, path)
    return start + int(shares.argmax())


@CRITERIA.register("direction")
def direction(evidence: Evidence) -> int | None:
    """First layer from which the cosine with the peak direction stays above 0.99 up to the peak."""
    path = evidence.path
    if path is None:
        return None
    off = (path.cosines[1 : path.peak + 2] <= DIRECTION_COSINE).nonzero()
    return int(off[-1]) + 1 if len(off) else 0


def cumulative_layer(evidence: Evidence, path: Path, part: float) -> int | None:
    """First layer at which the counted cumulative share passes ``part``; None = never."""
    return first_over(path, evidence.norm_ratios(path), part)


def first_over(path: Path, ratios: Tensor, part: float) -> int | None:
    """:func:`cumulative_layer` from the token's norm ratios, by step."""
    start, shares = counted(path, ratios)
    over = (shares.cumsum(0) > part).nonzero()
    return start + int(over[0]) if len(over) else None


def counted_shares(evidence: Evidence, path: Path) -> tuple[int, Tensor]:
    """:func:`counted` with the evidence's norm ratios."""
    return counted(path, evidence.norm_ratios(path))


def counted(path: Path, ratios: Tensor) -> tuple[int, Tensor]:
    """First counted layer, and the shares from there to the peak.

    Counted is what came after the last erased stage; without one, everything, and the embedding
    counts as layer -1.
    """
    start = counted_from(path, ratios)
    if start:
        return start, path.shares[start : path.peak + 1]
    first = torch.tensor([path.embedding_share], dtype=path.shares.dtype)
    return -1, torch.cat([first, path.shares[: path.peak + 1]])


def _most_frequent(evidence: Evidence, flag: str) -> int | None:
    answers: Counter[int | None] = Counter()
    for i in range(len(evidence.steps[0])):
        answers[first_layer([getattr(rows[i], flag) for rows in evidence.layers])] += 1
    ranked = sorted(answers, key=lambda a: (-answers[a], a is None, a or 0))
    return ranked[0]


def _mean(rows: Sequence[SequenceRow], name: str) -> float:
    return sum(getattr(row, name) for row in rows) / len(rows)
