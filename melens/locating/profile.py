"""First pass: the few numbers that the criteria need, and which tokens turn massive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from melens.batches import Batch
from melens.errors import ModelError
from melens.intervals import random_order
from melens.locating.thresholds import SPARSE_SHARE, SPARSE_TOKENS, last_body_layer
from melens.metrics.magnitude import NORM_RATIO, SUN_ABSOLUTE, SUN_RATIO
from melens.shapes import Resid


@dataclass(frozen=True)
class Entry:
    """One activation: where it is and its signed value."""

    position: int
    dim: int
    value: float


@dataclass(frozen=True)
class Hit:
    """One sparse massive entry: its token's absolute position and id, and how heavy that is."""

    position: int
    token_id: int
    dim: int
    value: float


@dataclass(frozen=True)
class Nearest:
    """The token that comes nearest to being massive: its largest entry, and its norm."""

    hit: Hit
    median: float
    """Median |x| of the layer output of its sequence."""
    norm_ratio: float
    """Its norm over the median token norm."""
    sharing: int
    """Tokens of the sequence that pass Sun et al.'s rule in the same dimension."""
    most: float
    """How many may share it."""
    closeness: float
    """The smallest of |x| over Sun et al.'s two thresholds and norm over NORM_RATIO; at most 1."""


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
    nearest: Nearest
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
        self.rows.extend(summarise(x.detach(), batch, self.site))

    def result(self) -> list[SequenceRow]:
        """The rows so far, in the order the sequences came."""
        return self.rows


def summarise(x: Resid, batch: Batch, site: str = "the residual") -> list[SequenceRow]:
    """Numbers of every sequence at one layer, ``x`` being that layer's output.

    Torch makes the few large operations, over all sequences at once; what is left are a few
    numbers a token, for NumPy. On busy cores every operation of torch waits for its threads.

    Raises:  ModelError: NaN, Inf, or values too large for float32, at real tokens.
    """
    magnitude = x.float().abs()
    norms = torch.linalg.vector_norm(magnitude, dim=-1)
    _require_finite(x, norms, batch, site)
    sizes = magnitude.amax(dim=-1).cpu().numpy(), norms.cpu().numpy()
    masks, ids, made = batch.mask.cpu().numpy(), batch.ids.cpu().numpy(), []
    for i, mask in enumerate(masks):
        at = mask.nonzero()[0]
        kept = magnitude[i] if len(at) == len(mask) else magnitude[i, torch.from_numpy(at)]
        tokens = _Tokens(x[i], at, ids[i, at], sizes[0][i, at], sizes[1][i, at])
        made.append(_summary(tokens, _median_of(kept)))
    return made


@dataclass(frozen=True)
class _Tokens:
    """The real tokens of one sequence."""

    x: Tensor
    """``[pos, d_model]``, padding included."""
    at: np.ndarray
    """Where each token stands in ``x``; the other fields are one a token."""
    ids: np.ndarray
    top: np.ndarray
    """Largest |x|."""
    norms: np.ndarray

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        """Activations of some tokens, float32."""
        return self.x[torch.from_numpy(self.at[tokens])].float().cpu().numpy()

    def hit(self, token: int, row: np.ndarray, dim: int) -> Hit:
        """One entry of a token, ``row`` being its activations."""
        return Hit(token, int(self.ids[token]), dim, float(row[dim]))


def _summary(tokens: _Tokens, median: float) -> SequenceRow:
    median_norm = max(_lower_median(tokens.norms), 1e-30)
    ratios = tokens.norms / np.float32(median_norm)
    threshold = max(SUN_ABSOLUTE, SUN_RATIO * median)
    near = np.minimum(tokens.top / np.float32(threshold), ratios / np.float32(NORM_RATIO))
    light = np.where(ratios < NORM_RATIO, tokens.top, -1.0)
    chosen = np.array([tokens.top.argmax(), light.argmax(), near.argmax()])
    loud = (tokens.top > SUN_ABSOLUTE).nonzero()[0]
    held = tokens.rows(np.concatenate([chosen, loud]))
    sizes, large = np.abs(held), held[len(chosen) :]
    top, ordinary, nearest = (
        tokens.hit(int(at), row, int(size.argmax()))
        for at, row, size in zip(chosen, held, sizes, strict=False)
    )
    own = SUN_RATIO * _lower_medians(sizes[len(chosen) :])
    over = np.abs(large) > np.float32(threshold)
    ratio, most = float(tokens.norms[chosen[2]]) / median_norm, _most(len(tokens.ids))
    return SequenceRow(
        top=Entry(top.position, top.dim, top.value),
        ordinary=Entry(ordinary.position, ordinary.dim, ordinary.value),
        median=median,
        token_median=_lower_median(sizes[0]),
        median_norm=median_norm,
        norm_ratio=float(tokens.norms.max()) / median_norm,
        sun=bool(over.any()),
        sun_own=bool((tokens.top[loud] > own).any()),
        nearest=Nearest(
            nearest,
            median,
            ratio,
            int(over[:, nearest.dim].sum()),
            most,
            min(1.0, abs(nearest.value) / threshold, ratio / NORM_RATIO),
        ),
        hits=tuple(
            tokens.hit(int(loud[row]), large[row], int(dim))
            for row, dim in zip(*(over & (over.sum(0) <= most)).nonzero(), strict=True)
            if ratios[loud[row]] >= NORM_RATIO
        ),
    )


def _most(tokens: int) -> float:
    """A dimension that more of a sequence's tokens share is broad."""
    return max(float(SPARSE_TOKENS), SPARSE_SHARE * tokens)


def _lower_median(values: np.ndarray) -> float:
    """The lower one of an even count, as torch's."""
    return float(_lower_medians(values))


def _lower_medians(values: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    middle = (values.shape[-1] - 1) // 2
    return np.partition(values, middle, axis=-1)[..., middle]


def _median_of(x: Tensor) -> float:
    """Of all entries. On the CPU NumPy's partition is five times as fast as torch's median."""
    return _lower_median(x.flatten().numpy()) if x.is_cpu else x.median().item()


def _require_finite(x: Tensor, norms: Tensor, batch: Batch, site: str) -> None:
    """A norm is finite only where every entry is."""
    odd = ~torch.isfinite(norms) & batch.mask.to(norms.device)
    if not odd.any():
        return
    bad, kind = int((~torch.isfinite(x[odd])).sum()), str(x.dtype).removeprefix("torch.")
    if not bad:
        raise ModelError(
            f"{site} holds activations up to {x[odd].abs().max().item():.3g}, too large for "
            "float32 statistics; these weights are damaged, or were never trained."
        )
    raise ModelError(
        f"{site} holds {bad} NaN or Inf activations in {kind}; "
        "load the model with dtype float32 or bfloat16."
    )


def first_layer(flags: Sequence[bool]) -> int | None:
    """Index of the first True."""
    return next((i for i, flag in enumerate(flags) if flag), None)


@dataclass(frozen=True)
class MassiveDim:
    """One massive dimension of a token: its largest value, and in how many sequences it is so."""

    dim: int
    value: float
    frequency: float


@dataclass(frozen=True)
class Group:
    """One massive token: a first token by its id, or a later one by its id."""

    first: bool
    token_id: int
    sequence: int
    """A sequence that holds it, at the earliest ``position``."""
    position: int
    frequency: float
    entries: tuple[MassiveDim, ...]
    """Its massive dimensions, the largest first."""

    @property
    def value(self) -> float:
        """Its largest entry, signed."""
        return self.entries[0].value


def group_hits(steps: Sequence[Sequence[SequenceRow]]) -> list[Group]:
    """Massive tokens, the primary one first; the final window is left out.

    Primary is a first token if one is massive, the most frequent one; of equally frequent ones
    the one of median size, so that one odd text does not speak for the model.
    """
    last = last_body_layer(len(steps) - 1)
    n = len(steps[0])
    found: dict[tuple[bool, int], list[tuple[int, Hit]]] = {}
    for rows in steps[1 : last + 2]:
        for sequence, row in enumerate(rows):
            for hit in row.hits:
                found.setdefault((hit.position == 0, hit.token_id), []).append((sequence, hit))
    groups = [_group(key, hits, n) for key, hits in found.items()]
    groups.sort(key=lambda g: (not g.first, -g.frequency, -abs(g.value), g.token_id))
    alike = [g for g in groups if (g.first, g.frequency) == (groups[0].first, groups[0].frequency)]
    if alike:
        primary = alike[len(alike) // 2]
        groups.remove(primary)
        groups.insert(0, primary)
    return groups


def _group(key: tuple[bool, int], hits: list[tuple[int, Hit]], n: int) -> Group:
    sequence, earliest = min(hits, key=lambda item: (item[1].position, -abs(item[1].value)))
    by_dim: dict[int, list[tuple[int, Hit]]] = {}
    for hit in hits:
        by_dim.setdefault(hit[1].dim, []).append(hit)
    entries = [_entry(dim, found, n) for dim, found in by_dim.items()]
    return Group(
        first=key[0],
        token_id=key[1],
        sequence=sequence,
        position=earliest.position,
        frequency=_frequency(hits, n),
        entries=tuple(sorted(entries, key=lambda entry: (-abs(entry.value), entry.dim))),
    )


def _entry(dim: int, hits: list[tuple[int, Hit]], n: int) -> MassiveDim:
    largest = max(hits, key=lambda item: (abs(item[1].value), -item[0]))[1]
    return MassiveDim(dim, largest.value, _frequency(hits, n))


def _frequency(hits: list[tuple[int, Hit]], n: int) -> float:
    return len({sequence for sequence, _ in hits}) / n


def sample_first_tokens(
    ids: Sequence[Sequence[int]], groups: Sequence[Group], *, count: int, seed: int
) -> list[int]:
    """Token ids to try alone at position 0: drawn from the texts, none of them first already."""
    known = {row[0] for row in ids} | {group.token_id for group in groups if group.first}
    pool = sorted({token for row in ids for token in row} - known)
    order = random_order(len(pool), seed=seed)
    return [pool[i] for i in order[:count].tolist()]
