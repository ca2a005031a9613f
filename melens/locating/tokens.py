"""Which tokens turn massive: the hits of the first pass, gathered by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from melens.locating.profile import Hit, SequenceRow
from melens.locating.thresholds import last_body_layer


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
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    return [pool[i] for i in order[:count].tolist()]
