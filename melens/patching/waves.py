"""Waves: many patched runs resumed together, each joining at the layer where it is patched.

All runs of a wave start at the same position. Runs that are patched at layer l join the wave there
with the unpatched residual, so no layer is run that the patch cannot change, and no position
before the patch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from melens.capture import hooked
from melens.patching.readouts import Readout
from melens.patching.sites import Place
from melens.patching.sources import write_into
from melens.resume import Resumable


@dataclass(frozen=True)
class Cell:
    """One patched run: a place, the columns patched there, and a head (None = all)."""

    place: Place
    columns: tuple[int, ...]
    position: int | None
    """The column swept, None where all of ``columns`` are patched together."""
    head: int | None

    @property
    def start(self) -> int:
        """The first column that can change."""
        return min(self.columns)

    @property
    def key(self) -> str:
        """Its name in a checkpoint."""
        axes = (self.place.layer, self.position, self.head)
        return " ".join([self.place.site, *("-" if axis is None else str(axis) for axis in axes)])


def changes(cell: Cell, readout: Readout, *, differs_from: int) -> bool:
    """Whether the metric can feel the patch: not behind its positions or layers, and not where
    both runs are one because no token before ``differs_from`` differs.
    """  # noqa: D205
    felt = cell.start <= readout.last_column and cell.place.layer < readout.stop
    return felt and max(cell.columns) >= differs_from


def plan_waves(cells: Sequence[Cell], run: Resumable, *, most: int, least: int) -> list[list[Cell]]:
    """Cells in groups that share a start, each of at most ``most`` tokens (at least one cell).

    Late positions leave short suffixes; they are taken together with the next ones until a group
    has ``least`` tokens, so that matrix products stay large.
    """
    rows, width = run.batch.ids.shape
    by_start: dict[int, list[Cell]] = defaultdict(list)
    for cell in cells:
        by_start[cell.start if run.suffixes else 0].append(cell)
    waves: list[list[Cell]] = []
    group: list[Cell] = []
    tokens = 0
    for start in sorted(by_start):
        tokens = tokens or rows * (width - start)
        group += by_start[start]
        if len(group) * tokens >= least:
            waves += _pieces(group, max(1, most // tokens))
            group, tokens = [], 0
    return waves + _pieces(group, max(1, most // tokens) if group else 1)


def _pieces(group: Sequence[Cell], size: int) -> list[list[Cell]]:
    """Near layers together: a wave begins at its first one."""
    ordered = sorted(group, key=lambda cell: cell.place.joins)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def run_wave(
    wave: Sequence[Cell], run: Resumable, source: Mapping[Place, Tensor], readout: Readout
) -> dict[str, list[float]]:
    """Run one wave; per cell its key and the metric of every row of the batch."""
    start = min(cell.start for cell in wave) if run.suffixes else 0
    joining: dict[int, list[Cell]] = defaultdict(list)
    for cell in wave:
        joining[cell.place.joins].append(cell)
    rows = len(run.batch)
    resid = run.resid_pre(0)[:0, start:]
    done: list[Cell] = []
    notes: dict[Any, Tensor] = {}
    readout.begin(start)
    for layer in range(min(joining), readout.stop + 1):
        fresh = joining.get(layer, [])
        if fresh:
            resid = torch.cat([resid, _entering(fresh, run, source, start)])
            readout.join(layer, len(fresh))
        if layer < readout.stop:
            hooks = [*_edits(fresh, source, len(done) * rows, start), *readout.hooks(layer)]
            with hooked(run.model, hooks):
                resid = run.block(layer, resid, start=start, notes=notes)
        done += fresh
    values = readout.values(resid, start).reshape(len(done), rows).tolist()
    return {cell.key: found for cell, found in zip(done, values, strict=True)}


def _entering(
    cells: Sequence[Cell], run: Resumable, source: Mapping[Place, Tensor], start: int
) -> Tensor:
    """The unpatched stream for each cell, patched where its place is the stream itself."""
    clean = run.resid_pre(cells[0].place.joins)[:, start:]
    made = clean.repeat(len(cells), 1, 1)
    for cell, block in zip(cells, made.split(len(clean)), strict=True):
        if cell.place.enters is not None:
            _write(cell, block, source[cell.place], start)
    return made


def _edits(
    cells: Sequence[Cell], source: Mapping[Place, Tensor], before: int, start: int
) -> list[tuple[str, Callable[..., Any]]]:
    """One editing hook a site; it touches the rows of its own cells, which follow ``before``."""
    by_hook: dict[str, list[tuple[int, Cell]]] = defaultdict(list)
    for i, cell in enumerate(cells):
        if cell.place.enters is None:
            by_hook[cell.place.hook].append((i, cell))

    def editing(mine: Sequence[tuple[int, Cell]]) -> Callable[..., Tensor]:
        def edit(x: Tensor, hook: object) -> Tensor:
            x = x.clone()
            for i, cell in mine:
                rows = len(source[cell.place])
                first = before + i * rows
                _write(cell, cell.place.view(x)[first : first + rows], source[cell.place], start)
            return x

        return edit

    return [(hook, editing(mine)) for hook, mine in by_hook.items()]


def _write(cell: Cell, view: Tensor, value: Tensor, start: int) -> None:
    columns = torch.tensor(cell.columns, device=view.device)
    write_into(view, value[:, columns].to(view.dtype), columns - start, cell.head)
