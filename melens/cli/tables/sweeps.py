"""The tables of a sweep: its cells, and what was gathered of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from melens.cli.listing import Listing, rest, table_of
from melens.protocols import JsonObject

MOST = 40
"""Cells that the table lists."""


@table_of("sweep")
def _sweep(result: Any) -> Iterator[Listing]:
    rows, fixed = result.cells, _fixed(result.cells)
    said = " ".join(f"{name}={value}" for name, value in fixed.items())
    shown = sorted(rows, key=lambda row: row.status == "done")[:MOST]
    everywhere = f"; everywhere {said}" if said else ""
    yield Listing(
        f"Cells (options as in the config{everywhere}):", [_cell(row, fixed) for row in shown]
    )
    yield from rest(len(shown), len(rows), "cells")
    kinds = Counter(row.kind for row in rows if row.kind is not None)
    if kinds:
        said = ", ".join(f"{kind} ({count})" for kind, count in kinds.items())
        yield Listing(
            f"\nResults: {said}. Tables over all cells: melens results {result.folder} --kind "
            f"{next(iter(kinds))}\n"
        )


def _fixed(rows: Any) -> JsonObject:
    """Options that have one value in every cell that has them."""
    values: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.options.items():
            values.setdefault(name, []).append(value)
    return {name: found[0] for name, found in values.items() if found.count(found[0]) == len(found)}


def _cell(row: Any, fixed: JsonObject) -> JsonObject:
    given = {name: value for name, value in row.options.items() if name not in fixed}
    return {
        "command": row.command,
        "model": row.model,
        "options": " ".join(f"{name}={value}" for name, value in given.items()),
        "status": row.status,
        "seconds": row.seconds,
        "error": row.error or "; ".join(row.notes),
    }
