"""Outcomes over sequences -> cells of the result, with paired intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from melens.isolation.texts import Outcome
from melens.metrics import mean_interval
from melens.results.isolate import Cell, Factorial, Interaction


def joined(batches: Sequence[Sequence[Outcome]]) -> list[Outcome]:
    """Outcomes of every change over all sequences, from one list a batch."""
    return [
        Outcome(
            torch.cat([one.coordinate for one in each]),
            torch.cat([one.sink_rate for one in each]),
            torch.cat([one.loss for one in each]),
        )
        for each in zip(*batches, strict=True)
    ]


def cell_of(found: Outcome, base: Outcome) -> Cell:
    """One cell; coordinate and sinks over the sequences that hold a massive token."""
    has = ~base.coordinate.isnan()
    changed = found.loss - base.loss
    return Cell(
        coordinate=found.coordinate[has].mean().item(),
        left=(found.coordinate[has].mean() / base.coordinate[has].mean()).item(),
        left_interval=mean_interval(found.coordinate[has] / base.coordinate[has]),
        sink_rate=found.sink_rate[has].mean().item(),
        sink_interval=mean_interval(found.sink_rate[has]),
        loss=found.loss.mean().item(),
        loss_delta=changed.mean().item(),
        loss_interval=mean_interval(changed),
    )


def factorial_of(cells: Sequence[Outcome], norm: str, ffn_edit: str) -> Factorial:
    """The 2 x 2 from its four outcomes: kept, flat norm, edited FFN, both."""
    base, flat, edited, both = cells
    has = ~base.coordinate.isnan()
    made = [cell_of(one, base) for one in cells]
    sinks = both.sink_rate - flat.sink_rate - edited.sink_rate + base.sink_rate
    losses = both.loss - flat.loss - edited.loss + base.loss
    sizes = [abs(cell.coordinate) for cell in made]
    logs = [math.log(size) for size in sizes] if all(sizes) else None
    return Factorial(
        norm=norm,
        ffn_edit=ffn_edit,
        kept_kept=made[0],
        flat_kept=made[1],
        kept_edited=made[2],
        flat_edited=made[3],
        interaction=Interaction(
            coordinate=made[3].coordinate - made[1].coordinate - made[2].coordinate
            + made[0].coordinate,
            log_coordinate=logs[3] - logs[1] - logs[2] + logs[0] if logs else None,
            sink_rate=made[3].sink_rate - made[1].sink_rate - made[2].sink_rate
            + made[0].sink_rate,
            sink_interval=mean_interval(sinks[has]),
            loss=made[3].loss - made[1].loss - made[2].loss + made[0].loss,
            loss_interval=mean_interval(losses),
        ),
    )  # fmt: skip
