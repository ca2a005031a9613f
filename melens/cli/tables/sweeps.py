"""The tables of a sweep: its cells, and what was gathered of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from melens.cli.listing import Listing, rest, table_of
from melens.protocols import JsonObject

if TYPE_CHECKING:
    from melens.results.sweep import CellRow, SweepReport

MOST = 40
"""Cells that the table lists."""


@table_of("sweep")
def _sweep(result: SweepReport) -> Iterator[Listing]:
    rows, fixed = result.cells, _fixed(result.cells)
    shown = sorted(rows, key=lambda row: row.status == "done")[:MOST]
    yield Listing(
        "Cells, with the options that differ between them (the JSON has all):",
        [_cell(row, fixed) for row in shown],
    )
    yield from rest(len(shown), len(rows), "cells")
    kinds = Counter(row.kind for row in rows if row.kind is not None)
    if kinds:
        said = ", ".join(f"{kind} ({count})" for kind, count in kinds.items())
        yield Listing(
            f"\nResults: {said}. Tables over all cells: melens results {result.folder} --kind "
            f"{next(iter(kinds))}\n"
        )


def told_apart(rows: Sequence[CellRow]) -> list[str]:
    """A name for each cell: its model, and the options that differ."""
    fixed = _fixed(rows)
    return [" ".join([row.model, _cell(row, fixed)["options"]]).strip() for row in rows]


def _fixed(rows: Sequence[CellRow]) -> JsonObject:
    """Options that tell no cells of a command apart: one value, in every cell of each command."""
    values: dict[str, list[object]] = {}
    for row in rows:
        for name, value in row.options.items():
            values.setdefault(name, []).append(value)
    fixed = {n: found[0] for n, found in values.items() if found.count(found[0]) == len(found)}
    partly = {
        name
        for name in fixed
        for command in {row.command for row in rows if name in row.options}
        if any(name not in row.options for row in rows if row.command == command)
    }
    return {name: value for name, value in fixed.items() if name not in partly}


def _cell(row: CellRow, fixed: JsonObject) -> JsonObject:
    given = {name: value for name, value in row.options.items() if name not in fixed}
    return {
        "command": row.command,
        "model": row.model,
        "options": " ".join(f"{name}={value}" for name, value in given.items()),
        "status": row.status,
        "seconds": row.seconds,
        "error": row.error or "; ".join(row.notes),
    }
