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
    rows = result.cells
    shown = sorted(rows, key=lambda row: row.status == "done")[:MOST]
    yield Listing("Cells (options as in the config):", [_cell(row) for row in shown])
    yield from rest(len(shown), len(rows), "cells")
    kinds = Counter(row.kind for row in rows if row.kind is not None)
    if kinds:
        said = ", ".join(f"{kind} ({count})" for kind, count in kinds.items())
        yield Listing(
            f"\nResults: {said}. Tables over all cells: melens results {result.folder} --kind "
            f"{next(iter(kinds))}\n"
        )


def _cell(row: Any) -> JsonObject:
    return {
        "command": row.command,
        "model": row.model,
        "options": " ".join(f"{name}={value}" for name, value in row.options.items()),
        "status": row.status,
        "seconds": row.seconds,
        "error": row.error or "; ".join(row.notes),
    }
