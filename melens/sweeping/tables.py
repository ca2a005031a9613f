"""The results of a sweep as one Parquet folder, and what is read from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from melens.protocols import JsonObject
from melens.store import write_atomically

if TYPE_CHECKING:
    from melens.results.base import Result
    from melens.sweeping.cells import SweepCell

ROWS = "rows"
"""Folder for kind=KIND/table=TABLE/CELL.parquet, which DuckDB and pandas read as one table."""
SUMMARY = "summary"
"""The table with one row a cell: every single number and text of its result."""
PLAIN = (str, int, float, bool)
LEFT_OUT = ("schema", "kind")


def keep_rows(folder: Path, cell: SweepCell, result: Result) -> None:
    """Every table of a result as Parquet, each row with its cell's axes before it.

    Raises:  OutputError: it cannot be written.
    """
    from melens.results.tabular import parquet_of

    kind, tables = result.schema_id.split("/")[1], tables_of(result)
    tables[SUMMARY] = tables.pop(SUMMARY)  # the last one: where it is, the others are
    for table, rows in tables.items():
        path = folder / ROWS / f"kind={kind}" / f"table={table}" / f"{cell.id}.parquet"
        if made := [_with_axes(cell, kind, row) for row in rows]:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, parquet_of(made), flush=False)  # made of the JSON again


def tables_of(result: Result) -> dict[str, list[JsonObject]]:
    """A result's tables by names without dots, and ``summary``: its single values in one row."""
    made = {SUMMARY: [_summary(result)]}
    for name, rows in result.tables().items():
        made[name.replace(".", "_")] = [_columns(row) for row in rows]
    return made


def _summary(result: Result) -> JsonObject:
    row: JsonObject = {"said": result.summary()}
    for name, value in _single(result.to_dict()):
        row.setdefault(name, value)
    return row


def _single(data: Mapping[str, object], before: str = "") -> Iterator[tuple[str, object]]:
    """Values that are no lists, parts by ``part_field``; a run's settings are no part of it."""
    for name, value in data.items():
        place = f"{before}{name}"
        if place in LEFT_OUT:
            continue
        if isinstance(value, Mapping):
            if place not in ("run_settings", "run_versions"):
                yield from _single(value, f"{place}_")
        elif value is None or isinstance(value, PLAIN):
            yield place, value


def _columns(row: JsonObject) -> JsonObject:
    from melens.results.tabular import flat

    return {name.replace(".", "_"): value for name, value in flat(row).items()}


def _with_axes(cell: SweepCell, kind: str, row: JsonObject) -> JsonObject:
    """A column of the result that has the name of an axis gets its kind before it."""
    axes = {"cell": cell.id, **cell.axes}
    own = {f"{kind.replace('-', '_')}_{name}" if name in axes else name: row[name] for name in row}
    return {name: _plain(value) for name, value in (axes | own).items()}


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, PLAIN) else json.dumps(value)
