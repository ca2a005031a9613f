"""sweep and results: many models and machines, and one table of what came out."""

from __future__ import annotations

import json
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from melens.cli import options as opt
from melens.cli import output
from melens.cli.listing import Listing, cell
from melens.cli.render import GAP, IN_A_FILE, room_for_lines, say, say_json, show_listings
from melens.errors import ResultError
from melens.formatting import counted
from melens.progress import hush, is_quiet, remark
from melens.protocols import Options

if TYPE_CHECKING:
    import pandas as pd

    from melens.results import Result
    from melens.results.sweep import CellRow, SweepReport
    from melens.sweeping.planning import SweepPlan

FAILED = 3
"""Exit code where a cell failed, or could not run."""


class EngineKind(StrEnum):
    """What runs cells."""

    local = "local"
    ray = "ray"
    slurm = "slurm"


def sweep(
    config: Annotated[
        Path, typer.Argument(help="A TOML file: models, options and [[run]] tables.")
    ],
    *,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The sweep's folder (default: out in the config)."),
    ] = None,
    engine: Annotated[
        EngineKind | None,
        typer.Option(
            help="local: this process; ray: this machine's cores or a cluster; slurm: array jobs "
            "through submitit. Default: the config's, or local."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Cells at a time (default: the config's, or 1).")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster, HOST:PORT or auto.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print cells, expected hours and memory; run nothing.")
    ] = False,
    as_json: opt.Json = False,
    offline: Annotated[
        bool,
        typer.Option("--offline", help="Never use the network; so does MELENS_OFFLINE=1."),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the summary line alone.")
    ] = False,
) -> None:
    """Run commands over many models and settings, on one machine or many.

    CONFIG names models and options at its top, and commands in [[run]] tables, with the same
    option names as on the command line; a list of values is an axis, and a cell is one command on
    one model with one value of each. What a config or a model refuses is said before the first
    cell runs. A cell that fails is a row with its error (exit code 3 at the end), and the rest
    goes on. Interrupted or killed, the same command runs what is missing. Every cell has a folder
    of its own in --out; all results together are Parquet, which 'melens results' reads.

    Examples:
      melens sweep sweep.toml --dry-run

      melens sweep sweep.toml --out runs/sweep

      melens sweep sweep.toml --engine ray --workers 8
    """
    _obey(offline=offline, quiet=quiet)
    from melens.sweeping import run

    beside: Options = {
        "out": out,
        "engine": engine and engine.value,
        "workers": workers,
        "address": address,
    }
    if dry_run:
        _show_plan(run.plan(config, **beside), as_json=as_json)
        return
    made = run.sweep(config, **beside, quiet=is_quiet())
    output.show(made, as_json=as_json, folder=Path(made.folder))
    if made.count("done") < len(made.cells):
        raise typer.Exit(FAILED)


def _obey(*, offline: bool, quiet: bool) -> None:
    from melens.network import go_offline

    if offline:
        go_offline()
    if quiet:
        hush()


def _show_plan(plan: SweepPlan, *, as_json: bool) -> None:
    if as_json:
        say_json({"summary": plan.summary(), "cells": plan.rows()})
        return
    if not is_quiet():
        show_listings([Listing("Cells, the first of each model first:", plan.rows(), ("typed",))])
    show_listings([Listing(plan.summary())])


def results(
    folder: Annotated[Path, typer.Argument(help="A sweep's folder.")],
    *,
    kind: Annotated[
        str | None,
        typer.Option(help="Kind of results, e.g. locate; sweep = the cells (default: the one)."),
    ] = None,
    table: Annotated[
        str, typer.Option(help="A table of that kind; summary has one row a cell.")
    ] = "summary",
    columns: Annotated[
        str | None, typer.Option(help="Columns to keep, in order, with commas (default: all).")
    ] = None,
    where: Annotated[
        str | None, typer.Option(help="A condition in SQL (DuckDB), e.g. 'me_layer > 3'.")
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(
            help="Columns with commas: numbers become means over each group's rows, with 95 % "
            "intervals."
        ),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Write CSV here, all digits; - is stdout.")
    ] = None,
    latex: Annotated[
        Path | None,
        typer.Option(help="Write a LaTeX table here (booktabs), rounded; - is stdout."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the cells' results of this kind in one figure, one line a cell."),
    ] = None,
    as_json: opt.Json = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Write files, print nothing but errors.")
    ] = False,
) -> None:
    """Show the results of a sweep as one table over all its cells.

    Without --kind, where there are several, says how the cells ended and which tables there are. A
    cell's model and options are columns of every row, so that --where and --group-by can use them.

    Examples:
      melens results runs/sweep

      melens results runs/sweep --kind locate --columns model,seed,me_layer,verdict

      melens results runs/sweep --kind evaluate --table main --group-by model,name --latex t.tex
    """
    _obey(offline=False, quiet=quiet)
    _refuse_places({"--csv": csv, "--latex": latex, "--plot": plot}, as_json=as_json)
    from melens.sweeping import gathering

    found = gathering.read_sweep(folder)
    if kind is None and len(kinds := gathering.kinds_of(folder)) != 1:
        if kinds and (where or group_by or columns or csv or latex or plot):
            names = ", ".join([*kinds, gathering.CELLS_KIND])
            raise ResultError(f"{folder} holds several kinds of results; add --kind: {names}.")
        _show_kinds(found, kinds, as_json=as_json)
        return
    if plot is not None:
        if group_by is not None:
            raise ResultError("--plot draws cells, not group means; drop --group-by.")
        wanted = set(gathering.gather(folder, kind, table, where=where)["cell"])
        drawn = gathering.results_of(folder, kind)
        _plot([(row, result) for row, result in drawn if row.cell in wanted], plot)
    frame = gathering.gather(
        folder, kind, table, columns=_names(columns), where=where, group_by=_names(group_by)
    )
    _write_frame(frame, csv, latex)
    if as_json:
        say_json(json.loads(frame.to_json(orient="records") or "[]"))
    elif csv is None and latex is None and plot is None and not is_quiet():
        _show_frame(frame, chosen=columns is not None)


def _refuse_places(places: dict[str, Path | None], *, as_json: bool) -> None:
    """Refuse files that cannot be written, and two things on stdout."""
    printed = ["--json"] if as_json else []
    for option, path in places.items():
        if path is not None and str(path) == "-":
            printed.append(f"{option} -")
        elif path is not None:
            output.refuse_unwritable_file(option, path)
    if len(printed) > 1:
        raise typer.BadParameter(f"{' and '.join(printed)} would mix on stdout; give one a file.")


def _names(text: str | None) -> tuple[str, ...]:
    return () if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _show_kinds(found: SweepReport, kinds: dict[str, list[str]], *, as_json: bool) -> None:
    output.show(found, as_json=as_json)
    if kinds and not as_json and not is_quiet():
        rows = [{"kind": kind, "tables": ", ".join(tables)} for kind, tables in kinds.items()]
        show_listings([Listing("\nTables, for --kind and --table:", rows)])


def _plot(found: list[tuple[CellRow, Result]], path: Path) -> None:
    from melens.cli.tables.sweeps import told_apart
    from melens.figures import compare, save_figure

    if not found:
        raise ResultError("there is no finished cell of that kind to draw.")
    results, names = [result for _, result in found], told_apart([row for row, _ in found])
    figure = results[0].plot() if len(results) == 1 else compare(results, names=names)
    save_figure(figure, path)
    remark(f"wrote {path}")


def _write_frame(frame: pd.DataFrame, csv: Path | None, latex: Path | None) -> None:
    from melens.results.tabular import csv_of, latex_of
    from melens.store import write_atomically

    for path, make in ((csv, csv_of), (latex, latex_of)):
        if path is not None and str(path) == "-":
            say(make(frame).rstrip("\n"))
        elif path is not None:
            write_atomically(path, make(frame))
            remark(f"wrote {path}")


LONGEST = 32
"""Signs of a text, above which its column is shown only where it was asked for."""
RECORDS = ("cell", "said", "rule")
MANY = 4
"""Columns that begin with the same word are one part of the result, shown only if asked for."""


def _show_frame(frame: pd.DataFrame, *, chosen: bool) -> None:
    """The columns that were asked for; else short ones, as many as fit."""
    shown = list(frame.columns) if chosen else _fitting(frame)
    rows = json.loads(frame[shown].to_json(orient="records", double_precision=15) or "[]")
    left_out = [name for name in frame.columns if name not in shown]
    show_listings([Listing(f"{counted(len(rows), 'row')}:", rows)])
    if left_out:
        names = ", ".join(left_out)
        show_listings([Listing(f"Also there, for --columns: {names}. --csv and --json have all.")])


def _fitting(frame: pd.DataFrame) -> list[str]:
    begins = Counter(name.partition("_")[0] for name in frame.columns)
    room, made = (room_for_lines() or IN_A_FILE) - 4 * GAP, []
    for name in frame.columns:
        texts = [cell(value) for value in frame[name].dropna()]
        width = max(map(len, [*name.split("_"), *texts]), default=0) + GAP
        part = begins[name.partition("_")[0]] >= MANY
        if name in RECORDS or part or not texts or width > LONGEST or width > room:
            continue
        room -= width
        made.append(name)
    return made
