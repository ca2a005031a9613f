"""What a sweep would cost: hours from each command's forward passes, memory from the weights."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from melens.errors import MelensError
from melens.formatting import counted
from melens.protocols import JsonObject
from melens.sweeping.cells import SweepCell
from melens.sweeping.config import EngineConfig
from melens.sweeping.work import CELLS, row_of

PASSES = {
    "locate": 1.0,
    "describe": 1.2,
    "collapse": 3.2,
    "metric": 1.2,
    "sinks": 1.8,
    "mixers": 2.0,
    "attention": 2.0,
    "reach": 1.0,
    "isolate": 44.0,
    "super-weights": 20.0,
    "patch": 100.0,
    "eval": 13.0,
    "long-context": 10.0,
    "check": 70.0,
}
"""Forward passes over a command's texts at its defaults, finding the ME Layer first included.
Source: docs/costs.md (ratios to a bare forward pass), docs/numbers.md."""
SEQUENCES, LENGTH = 8, 128
"""Of texts where none are chosen."""
LOADING = 5.0
"""Seconds to load a small model."""
ROOM = 1e9
"""Bytes of activations and of the libraries themselves, at small batches."""


@dataclass(frozen=True)
class SweepPlan:
    """The cells of a sweep, and about what they take."""

    cells: tuple[SweepCell, ...]
    done: int
    """Of the cells; they do not run again."""
    engine: EngineConfig
    seconds: tuple[float | None, ...]
    """Of each cell, rough (a factor of three either way); None = not known."""
    memory: dict[str, float | None]
    """Bytes a worker needs, by model."""

    def rows(self) -> list[JsonObject]:
        """One row a cell."""
        return [
            {
                "command": cell.command,
                "model": cell.model,
                "options": " ".join(f"{key}={value}" for key, value in cell.options.items()),
                "minutes": None if cost is None else round(cost / 60, 2),
                "GB": None if (held := self.memory[cell.model]) is None else round(held / 1e9, 1),
                "typed": "melens " + " ".join(cell.argv),
            }
            for cell, cost in zip(self.cells, self.seconds, strict=True)
        ]

    def summary(self) -> str:
        """One plain sentence."""
        known = [cost for cost in self.seconds if cost is not None]
        cells, models = len(self.cells), len(self.memory)
        said = f"{counted(cells, 'cell')} on {counted(models, 'model')}, {self.done} of them done"
        if not known:
            return f"{said}; how long they take is not known."
        hours = sum(known) / self.engine.workers / 3600
        more = (
            f" without {n} cells of unknown time" if (n := len(self.seconds) - len(known)) else ""
        )
        held = [size for size in self.memory.values() if size is not None]
        memory = f", {max(held) / 1e9:.1f} GB a worker" if held else ""
        seconds = 3600 * hours
        time_said = f"{hours:.1f} hours" if hours >= 1 else f"{seconds / 60:.0f} minutes"
        time_said = f"{seconds:.0f} s" if seconds < 90 else time_said
        return (
            f"{said}; about {time_said} on {self.engine.workers} worker"
            f"{'s' * (self.engine.workers > 1)}{memory}{more}. Times are rough: a factor of three "
            "either way."
        )


def plan_of(cells: Sequence[SweepCell], engine: EngineConfig, folder: Path) -> SweepPlan:
    """Costs of every cell; the weights' headers are read, nothing is run but a matrix product."""
    ended = {cell.id: row_of(folder / CELLS / cell.id) for cell in cells}
    seen: dict[tuple[str, str], list[float]] = {}
    for row in ended.values():
        if row is not None and row.status == "done" and row.seconds is not None:
            seen.setdefault((row.command, row.model), []).append(row.seconds)
    sizes = {cell.model: _parameters(cell.argv[1]) for cell in cells}
    done = [cell.id for cell in cells if (row := ended[cell.id]) and row.status == "done"]
    costs = [0.0 if c.id in done else _seconds(c, sizes[c.model], seen) for c in cells]
    for first in {cell.model: i for i, cell in reversed(list(enumerate(cells)))}.values():
        if costs[first]:  # a worker keeps the model
            costs[first] = (costs[first] or 0.0) + LOADING
    memory: dict[str, float | None] = {}
    for cell in cells:
        size, most = sizes[cell.model], memory.get(cell.model)
        needed = None if size is None else size * _width(cell) + ROOM
        memory[cell.model] = needed if most is None or needed is None else max(most, needed)
    return SweepPlan(tuple(cells), len(done), engine, tuple(costs), memory)


def _seconds(
    cell: SweepCell, parameters: int | None, seen: dict[tuple[str, str], list[float]]
) -> float | None:
    """The median of such cells that are done, else an estimate from operations."""
    if before := seen.get((cell.command, cell.model)):
        return statistics.median(before)
    if parameters is None:
        return None
    if cell.command == "scan":
        return parameters * 2 / 1e9 + 1
    if cell.command not in PASSES:
        return None
    given = cell.params()
    count = given.get("n_seq") or given.get("n") or SEQUENCES
    tokens = count * (given.get("length") or LENGTH)
    return PASSES[cell.command] * 2 * parameters * tokens / _speed()


def _width(cell: SweepCell) -> int:
    """Bytes of a weight; 4 where the dtype is only known from the files."""
    from melens.models.loading import DTYPES

    dtype = getattr(cell.params().get("dtype"), "value", "float32")
    return DTYPES.get(dtype, DTYPES["float32"]).itemsize


def _parameters(model: str) -> int | None:
    """Of a model's files; None where they cannot be read from here."""
    from melens.models.opening import open_checkpoint

    try:
        with closing(open_checkpoint(model)) as files:
            return sum(math.prod(shape) for shape in files.shapes.values())
    except MelensError:
        return None


@cache
def _speed() -> float:
    """Operations a second of this machine, in a matrix product as a small model has them."""
    import torch

    left, right = torch.ones(512, 1024), torch.ones(1024, 1024)
    torch.matmul(left, right)
    start = time.perf_counter()
    for _ in range(4):
        torch.matmul(left, right)
    return 4 * 2 * 512 * 1024 * 1024 / (time.perf_counter() - start)
