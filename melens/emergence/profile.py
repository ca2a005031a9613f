"""First pass: per layer and sequence, the few numbers that the profile and the criteria need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from melens.batches import Batch
from melens.emergence.thresholds import (
    NORM_RATIO,
    SPARSE_SHARE,
    SPARSE_TOKENS,
    SUN_ABSOLUTE,
    SUN_RATIO,
)
from melens.errors import ModelError


@dataclass(frozen=True)
class Hit:
    """One sparse massive entry: its token's absolute position and id, and how heavy that is."""

    position: int
    token_id: int
    dim: int
    value: float


@dataclass(frozen=True)
class Entry:
    """One activation: where it is and its signed value."""

    position: int
    dim: int
    value: float


@dataclass(frozen=True)
class SequenceRow:
    """One sequence at one layer's output."""

    top: Entry
    """The largest |x| of all tokens."""
    ordinary: Entry
    """The largest |x| of the tokens that are not heavy."""
    median: float
    token_median: float
    median_norm: float
    norm_ratio: float
    sun: bool
    """Sun et al.'s rule fires, whatever the number of tokens."""
    sun_own: bool
    """The same with the token's own median."""
    closeness: float
    """How near the heaviest token comes to being massive, in [0, 1]."""
    hits: tuple[Hit, ...]

    @property
    def max(self) -> float:
        """Largest |x|."""
        return abs(self.top.value)


@dataclass
class LayerProfile:
    """Reducer: keeps one :class:`SequenceRow` a sequence, never an activation."""

    site: str = "the residual"
    rows: list[SequenceRow] = field(default_factory=list)

    def update(self, x: Tensor, batch: Batch) -> None:
        """Take in ``[batch, pos, d_model]`` residuals; statistics in float32."""
        for i in range(len(batch)):
            keep = batch.mask[i]
            whole = bool(keep.all())
            part = x[i].detach() if whole else x[i].detach()[keep]
            ids = batch.ids[i] if whole else batch.ids[i][keep]
            _require_finite(part, self.site)
            self.rows.append(summarise(part, ids))

    def result(self) -> list[SequenceRow]:
        """The rows so far, in the order the sequences came."""
        return self.rows


def summarise(x: Tensor, ids: Tensor) -> SequenceRow:
    """Numbers of one sequence at one layer. ``x``: [token, d_model], padding dropped."""
    magnitude = x.float().abs()
    top, dims = magnitude.max(dim=-1)
    ids = ids.to(x.device)
    norms = torch.linalg.vector_norm(magnitude, dim=-1)
    median = magnitude.flatten().median().item()
    median_norm = max(norms.median().item(), 1e-30)
    ratios = norms / median_norm
    at = int(top.argmax())
    light = int(top.where(ratios < NORM_RATIO, -1.0).argmax())
    threshold = max(SUN_ABSOLUTE, SUN_RATIO * median)
    heavy = int(norms.argmax())
    ratio = norms[heavy].item() / median_norm
    nearness = top[heavy].item() / threshold
    return SequenceRow(
        top=Entry(at, int(dims[at]), x[at, dims[at]].item()),
        ordinary=Entry(light, int(dims[light]), x[light, dims[light]].item()),
        median=median,
        token_median=magnitude[at].median().item(),
        median_norm=median_norm,
        norm_ratio=ratio,
        sun=bool(top[at] > threshold),
        sun_own=_sun_own(magnitude, top),
        closeness=min(1.0, nearness, ratio / NORM_RATIO),
        hits=_sparse_hits(x, magnitude, top, ids, threshold, ratios),
    )


def _sun_own(magnitude: Tensor, top: Tensor) -> bool:
    large = magnitude[top > SUN_ABSOLUTE]
    if not len(large):
        return False
    return bool((large.amax(dim=-1) > SUN_RATIO * large.median(dim=-1).values).any())


def _sparse_hits(
    x: Tensor, magnitude: Tensor, top: Tensor, ids: Tensor, threshold: float, ratios: Tensor
) -> tuple[Hit, ...]:
    """Entries over the threshold in dimensions that only a few tokens share."""
    tokens = (top > threshold).nonzero().flatten()
    if not len(tokens):
        return ()
    over = magnitude[tokens] > threshold
    few = over.sum(dim=0) <= max(SPARSE_TOKENS, SPARSE_SHARE * len(x))
    found = []
    for row, dim in (over & few).nonzero().tolist():
        at = int(tokens[row])
        if ratios[at] >= NORM_RATIO:
            found.append(Hit(at, int(ids[at]), dim, x[at, dim].item()))
    return tuple(found)


def _require_finite(x: Tensor, site: str) -> None:
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ModelError(
            f"{site} holds {bad} NaN or Inf activations in {str(x.dtype).removeprefix('torch.')}; "
            "load the model with dtype float32 or bfloat16."
        )


def first_layer(flags: Sequence[bool]) -> int | None:
    """Index of the first True."""
    return next((i for i, flag in enumerate(flags) if flag), None)
