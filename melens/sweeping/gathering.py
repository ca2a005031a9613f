"""Read a sweep's results: one table over all cells, chosen and averaged by DuckDB."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melens.errors import ResultError, UnknownNameError
from melens.formatting import brief
from melens.intervals import mean_interval
from melens.protocols import JsonObject
from melens.registry import unknown_name
from melens.results.base import Result, load_result
from melens.results.sweep import CellRow, SweepReport
from melens.sweeping.tables import ROWS, SUMMARY, keep_rows

if TYPE_CHECKING:
    import pandas as pd

RECORD = "sweep.json"
"""File in a sweep's folder that lists its cells."""
CELLS_KIND = "sweep"
"""Kind whose table is the list of cells, whatever they measured."""


def read_sweep(folder: str | Path) -> SweepReport:
    """The cells of a sweep's folder as they are now, those that run elsewhere included.

    Raises:  ResultError: it is no sweep's folder.
    """
    from melens.sweeping.work import CELLS, row_of

    folder = Path(folder).expanduser()
    if not (folder / RECORD).is_file():
        raise ResultError(f"{folder} is not a sweep's folder: it has no {RECORD}.")
    found = load_result(folder / RECORD)
    if not isinstance(found, SweepReport):
        raise ResultError(f"{folder / RECORD} holds a result of {found.schema_id!r}, not a sweep.")
    now = tuple(
        row_of(folder / CELLS / row.cell) or row.model_copy(update={"status": "missing"})
        for row in found.cells
    )
    return found.model_copy(update={"cells": now})


def kinds_of(folder: str | Path) -> dict[str, list[str]]:
    """Kinds of results in a sweep, and the tables of each."""
    found: dict[str, list[str]] = {}
    folder = Path(folder).expanduser()
    keep_missing_rows(folder, [row for row in read_sweep(folder).cells if row.status == "done"])
    for path in sorted((folder / ROWS).glob("kind=*/table=*")):
        found.setdefault(path.parent.name[5:], []).append(path.name[6:])
    return found


def gather(
    folder: str | Path,
    kind: str | None = None,
    table: str = SUMMARY,
    *,
    columns: Sequence[str] = (),
    where: str | None = None,
    group_by: Sequence[str] = (),
) -> pd.DataFrame:
    """One table over all finished cells of a sweep, a cell's axes as columns of every row.

    Args:    kind: of the results, e.g. ``locate``; None = the only kind there is. ``sweep`` is the
             list of cells. table: a name of the result's ``tables()``, dots as underscores;
             ``summary`` has one row a cell. columns: those to keep, in this order. where: a
             condition in DuckDB's SQL, e.g. ``"me_layer > 3 and model like 'smol%'"``.
             group_by: columns; every number becomes the mean over a group's cells of each cell's
             own mean (rows of one cell are not independent), with the 95 % bootstrap interval over
             cells (``_low``, ``_high``; empty below 5 cells). ``cells`` counts those of the group;
             where some have no such number, ``_cells`` counts those that have.
    Raises:  ResultError: no sweep, or a condition that DuckDB refuses. UnknownNameError: no such
             kind, table or column.
    """
    folder = Path(folder).expanduser()
    sweep = read_sweep(folder)
    if kind == CELLS_KIND:
        frame = _queried(sweep.to_frame().assign(_row=0), where, sweep.cells)
    else:
        done = [row for row in sweep.cells if row.status == "done"]
        keep_missing_rows(folder, done)
        kind, table = _require_table(folder, kind, table)
        frame = _read(folder, kind, table, where, [row for row in done if row.kind == kind])
    if group_by:
        axes = {name for row in sweep.cells for name in _axes(row)}
        frame = _grouped(frame, _existing(frame, group_by), columns, axes)
        columns = ()
    return frame.loc[:, _existing(frame, columns)] if columns else frame


def _require_table(folder: Path, kind: str | None, table: str) -> tuple[str, str]:
    kinds = kinds_of(folder)
    if not kinds:
        raise ResultError(f"{folder} holds no result yet; run: melens sweep CONFIG.toml.")
    if kind is None and len(kinds) > 1:
        raise ResultError(f"{folder} holds several kinds of results; name one: {', '.join(kinds)}.")
    kind = next(iter(kinds)) if kind is None else kind
    if kind not in kinds:
        raise UnknownNameError(unknown_name("kind", kind, [*kinds, CELLS_KIND]))
    if table not in kinds[kind]:
        raise UnknownNameError(unknown_name("table", table, kinds[kind]))
    return kind, table


def _read(
    folder: Path, kind: str, table: str, where: str | None, cells: Sequence[CellRow]
) -> pd.DataFrame:
    """One table of these cells; damaged files are made again, once."""
    import duckdb

    place = folder / ROWS / f"kind={kind}" / f"table={table}"
    files = [place / f"{row.cell}.parquet" for row in cells]
    there = [str(file) for file in files if file.is_file()]
    try:
        return _queried(there, where, cells)
    except (duckdb.IOException, duckdb.InvalidInputException):
        keep_missing_rows(folder, cells, again=True)
    try:
        return _queried(there, where, cells)
    except (duckdb.IOException, duckdb.InvalidInputException) as error:
        said = str(error).strip().splitlines()[0]
        raise ResultError(f"cannot read the tables in {place}: {said[:200]}") from None


def _queried(
    source: list[str] | pd.DataFrame, where: str | None, cells: Sequence[CellRow]
) -> pd.DataFrame:
    """Rows of these cells, in their order, which fulfil a condition."""
    import duckdb
    import pandas as pd

    with duckdb.connect() as session:
        order = pd.DataFrame({"cell": [row.cell for row in cells], "_place": range(len(cells))})
        session.register("_cells", order)
        if isinstance(source, list):
            how = "union_by_name = true, hive_partitioning = false, file_row_number = true"
            wanted = "* exclude (file_row_number), file_row_number as _row"
            query = f"create temp table _all as select {wanted} from read_parquet(?, {how})"
            session.execute(query, [source])
        else:
            session.register("_all", source)
        session.execute("set enable_external_access = false")  # a condition reads no files
        condition = f"where {where}" if where else ""
        query = (
            f"select * exclude (_place, _row) from (select * from _all {condition}) "
            "join _cells using (cell) order by _place, _row"
        )
        try:
            return session.execute(query).df()
        except duckdb.Error as error:
            said = str(error).strip().splitlines()[0]
            raise ResultError(f"--where {brief(where or '', 80)} cannot be used: {said}") from None


def _existing(frame: pd.DataFrame, names: Sequence[str]) -> list[str]:
    from melens.results.tabular import chosen

    return chosen(frame, list(names))


def _axes(row: CellRow) -> list[str]:
    return ["model", *(name.replace("-", "_") for name in row.options)]


def _grouped(
    frame: pd.DataFrame, keys: list[str], columns: Sequence[str], axes: set[str]
) -> pd.DataFrame:
    """Means of the numbers over each group's rows, with their intervals; of no axis unasked."""
    import pandas as pd

    unasked = [name for name in frame.columns if name not in axes]
    wanted = _existing(frame, columns) if columns else unasked
    numbers = [name for name in wanted if name not in keys and _is_number(frame[name])]
    if clash := [name for name in numbers if name in ("cells", *keys)]:
        raise ResultError(f"a column is called {clash[0]}, as the count of a group's cells is.")
    made = []
    groups: Any = frame.groupby(keys, dropna=False, sort=False)
    for values, group in groups:
        cells = group.groupby("cell", sort=False)
        row: JsonObject = dict(zip(keys, values, strict=True)) | {"cells": len(cells)}
        for name in numbers:
            row |= _mean(name, cells[name].mean(), len(cells))
        made.append(row)
    return pd.DataFrame(made)


def _is_number(column: object) -> bool:
    from pandas.api import types

    return bool(types.is_numeric_dtype(column) and not types.is_bool_dtype(column))


def _mean(name: str, column: pd.Series, cells: int) -> dict[str, float]:
    """Of the cells' own means; how many there are, where it is not all."""
    import torch

    known = torch.tensor(column.dropna().astype(float).tolist(), dtype=torch.float64)
    low, high = mean_interval(known) or (math.nan, math.nan)
    mean = float(known.mean()) if len(known) else math.nan
    made = {name: mean, f"{name}_low": low, f"{name}_high": high}
    return made if len(known) == cells else made | {f"{name}_cells": len(known)}


def results_of(folder: str | Path, kind: str | None = None) -> list[tuple[CellRow, Result]]:
    """Every finished cell with its result, of one kind or of all.

    Raises:  ResultError: no sweep, or a result that cannot be read.
    """
    folder = Path(folder).expanduser()
    return [
        (row, load_result(folder / row.result))
        for row in read_sweep(folder).cells
        if row.result is not None and kind in (None, row.kind)
    ]


def keep_missing_rows(folder: Path, cells: Sequence[CellRow], *, again: bool = False) -> None:
    """Make Parquet of the JSON of those cells that have none: a power failure may take it.

    Args:    again: of all of them.
    """
    from melens.sweeping.cells import SweepCell

    for row in cells:
        made = folder / ROWS / f"kind={row.kind}" / f"table={SUMMARY}" / f"{row.cell}.parquet"
        if row.result is None or (made.is_file() and not again):
            continue
        cell = SweepCell(row.cell, row.command, row.model, dict(row.options), row.argv)
        keep_rows(folder, cell, load_result(folder / row.result))
