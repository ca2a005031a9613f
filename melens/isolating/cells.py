"""Outcomes over sequences -> cells of the result, with paired intervals.

Losses and sinks are resampled over sequences. Coordinates are resampled over distinct inputs up to
the massive token: sequences that agree up to it are one observation, and one has no interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from melens.intervals import bootstrap, mean_interval
from melens.isolating.runs import EditOutcome
from melens.results.isolate import Cell, Factorial, Interaction

Groups = Tensor
"""Index of every sequence's distinct input; -1 without a massive token."""


def joined(batches: Sequence[Sequence[EditOutcome]]) -> list[EditOutcome]:
    """Outcomes of every change over all sequences, from one list a batch."""
    return [
        EditOutcome(
            torch.cat([one.coordinate for one in each]),
            torch.cat([one.sink_rate for one in each]),
            torch.cat([one.loss for one in each]),
        )
        for each in zip(*batches, strict=True)
    ]


def cell_of(found: EditOutcome, base: EditOutcome, groups: Groups) -> Cell:
    """One cell; coordinate and sinks over the sequences that hold a massive token."""
    has = groups >= 0
    coordinates = _by_input(found, groups), _by_input(base, groups)
    changed = found.loss - base.loss
    return Cell(
        coordinate=coordinates[0].mean().item(),
        left=_ratio(*coordinates).item(),
        left_interval=bootstrap(_ratio, *coordinates),
        sink_rate=found.sink_rate[has].mean().item(),
        sink_interval=mean_interval(found.sink_rate[has]),
        loss=found.loss.mean().item(),
        loss_delta=changed.mean().item(),
        loss_interval=mean_interval(changed),
    )


def factorial_of(
    cells: Sequence[EditOutcome], groups: Groups, norm: str, ffn_edit: str
) -> Factorial:
    """The 2 x 2 from its four outcomes: kept, flat norm, edited FFN, both."""
    base, flat, edited, both = (cell_of(one, cells[0], groups) for one in cells)
    return Factorial(
        norm=norm,
        ffn_edit=ffn_edit,
        kept_kept=base,
        flat_kept=flat,
        kept_edited=edited,
        flat_edited=both,
        interaction=_interaction(cells, (base, flat, edited, both), groups),
    )


def _interaction(
    outcomes: Sequence[EditOutcome], cells: Sequence[Cell], groups: Groups
) -> Interaction:
    base, flat, edited, both = cells
    inputs = [_by_input(one, groups) for one in outcomes]
    logs = bool(torch.stack([row.mean() for row in inputs]).all())
    sinks = _beyond(*(one.sink_rate for one in outcomes))
    losses = _beyond(*(one.loss for one in outcomes))
    return Interaction(
        coordinate=_beyond(*(cell.coordinate for cell in cells)),
        coordinate_interval=bootstrap(_additive, *inputs),
        log_coordinate=_logarithmic(*inputs).item() if logs else None,
        log_interval=bootstrap(_logarithmic, *inputs) if logs else None,
        sink_rate=_beyond(base.sink_rate, flat.sink_rate, edited.sink_rate, both.sink_rate),
        sink_interval=mean_interval(sinks[groups >= 0]),
        loss=_beyond(base.loss, flat.loss, edited.loss, both.loss),
        loss_interval=mean_interval(losses),
    )


V = TypeVar("V", float, Tensor)


def _beyond(base: V, flat: V, edited: V, both: V) -> V:
    return both - flat - edited + base


def _ratio(found: Tensor, base: Tensor) -> Tensor:
    return found.mean(-1) / base.mean(-1)


def _additive(*inputs: Tensor) -> Tensor:
    return _beyond(*(row.mean(-1) for row in inputs))


def _logarithmic(*inputs: Tensor) -> Tensor:
    return _beyond(*(row.mean(-1).abs().log() for row in inputs))


def _by_input(outcome: EditOutcome, groups: Groups) -> Float[Tensor, " input"]:
    """Coordinates, one a distinct input."""
    return torch.stack(
        [outcome.coordinate[groups == i].mean() for i in groups[groups >= 0].unique().tolist()]
    )
