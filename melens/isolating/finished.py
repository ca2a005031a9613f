"""Finished runs of an isolation: each counts once, and a kill leaves those that are done."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from melens.errors import MetricError
from melens.isolating.changes import Change, Outcome
from melens.item_rows import ItemRow, Rows

TOKEN = "token"
"""What the massive token alone shows, beside what each batch of texts does."""


class Finished:
    """Runs by name; on disk, each as soon as it is known, if there is a path."""

    def __init__(self, path: Path | None, facts: dict[str, Any]) -> None:
        """Take up an earlier run's.

        Args:    facts: what the numbers depend on.
        Raises:  ResultError: the file is of another isolation, or damaged.
        """  # fmt: skip
        self.path = path
        self.rows = Rows(path, facts, of="isolation")

    def number(self, name: str, measure: Callable[[], float]) -> float:
        """A number of the massive token: known, or measured now.

        Raises:  MetricError: it is not finite.
        """
        if not self.rows.has(TOKEN, name):
            value = measure()
            if not math.isfinite(value):
                raise MetricError(
                    f"under '{name}' the massive coordinate is {value}; load the model in float32 "
                    "or bfloat16."
                )
            self.rows.add([ItemRow(TOKEN, name, value, 1.0)])
        return self.rows.found[TOKEN, name].value

    def outcome(self, batch: int, change: Change) -> Outcome | None:
        """What a batch of texts showed under a change; None where that is not known yet."""
        found = self.rows.found.get((f"batch {batch}", change.name))
        return None if found is None else Outcome(**{k: _tensor(v) for k, v in found.about.items()})

    def add_outcome(self, batch: int, change: Change, found: Outcome) -> None:
        """Keep what a batch of texts showed."""
        if not torch.isfinite(found.loss).all():
            raise MetricError(
                f"under '{change.name}' a text's loss is not finite; load the model in float32 or "
                "bfloat16."
            )
        about = {name: _listed(getattr(found, name)) for name in Outcome.__dataclass_fields__}
        row = ItemRow(
            f"batch {batch}", change.name, found.loss.mean().item(), float(len(found.loss)),
            about=about,
        )  # fmt: skip
        self.rows.add([row])

    def remove(self) -> None:
        """The result is there: what led to it is not needed any more."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _listed(x: Tensor) -> list[float | None]:
    """JSON knows no NaN."""
    return [None if math.isnan(value) else value for value in x.tolist()]


def _tensor(values: list[float | None]) -> Tensor:
    return torch.tensor(
        [math.nan if value is None else value for value in values], dtype=torch.float64
    )
