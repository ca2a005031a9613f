"""sweep(): many cells, each one command of melens, on one machine or many."""

from __future__ import annotations

import contextlib
import datetime
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from melens.errors import OutputError, ResultError, SweepError
from melens.formatting import brief
from melens.progress import remark
from melens.provenance import command_line, versions
from melens.results.base import load_result
from melens.results.sweep import CellRow, SweepReport
from melens.settings import require_path
from melens.store import write_atomically
from melens.store.disk import real_path
from melens.sweeping.cells import SweepCell, cells_of
from melens.sweeping.config import EngineConfig, SweepConfig, read_config
from melens.sweeping.engines import SESSION, Engine, engine_of, parts_of
from melens.sweeping.gathering import RECORD, read_sweep
from melens.sweeping.planning import SweepPlan, plan_of
from melens.sweeping.preflight import preflight, require_models
from melens.sweeping.watching import watching
from melens.sweeping.work import CELLS, Work, rows_of

LOCK = ".sweep.lock"
Given = str | Path | Mapping[str, object]


@dataclass(frozen=True)
class SweepJob:
    """A sweep that was understood: its cells, where they go and what runs them."""

    config: SweepConfig
    cells: tuple[SweepCell, ...]
    folder: Path


def sweep(
    config: Given,
    *,
    out: str | Path | None = None,
    engine: str | None = None,
    workers: int | None = None,
    address: str | None = None,
    quiet: bool = False,
) -> SweepReport:
    """Run every cell of a sweep that is not done yet, and list how each ended.

    A cell is one command of melens (``locate``, ``eval``, ...) on one model, with one value of
    every list in the config. A cell that fails is a row with its error; the rest goes on. The same
    call again runs what is missing or failed.

    Args:    config: a TOML file, or a mapping with what it would hold: ``model``, options of all
             runs, ``run`` (a list of tables with ``command`` and its options) and ``engine``.
             out: the sweep's folder; None = the config's. engine: ``local``, ``ray`` or ``slurm``.
             workers: cells at a time. address: of a running Ray cluster. quiet: no progress.
    Returns: one row a cell; :func:`melens.sweeping.gather` gives the results as one table.
    Raises:  SweepError and others: what cannot run is refused before the first cell. EngineError:
             no cluster answers, or workers are lost again and again. OutputError: the folder
             cannot be written, or another sweep is at work in it.
    """
    asked = understood(config, out=out, engine=engine, workers=workers, address=address)
    _make(asked.folder)
    with _alone(asked.folder), engine_of(asked.config.engine, asked.folder) as ready:
        _say_left_out(asked)
        record = _record(asked)
        preflight(_waiting(asked), asked.folder)
        write_atomically(asked.folder / RECORD, record([]).to_json())
        try:
            _run(ready, asked, quiet=quiet)
        finally:
            made = record(list(rows_of(asked.folder, asked.cells)))
            write_atomically(asked.folder / RECORD, made.to_json())
    return made


def understood(
    config: Given,
    *,
    out: str | Path | None = None,
    engine: str | None = None,
    workers: int | None = None,
    address: str | None = None,
) -> SweepJob:
    """A config with what was said beside it; nothing is run and nothing is written.

    Raises:  SweepError: what has no meaning.
    """
    read = read_config(config)
    if engine == "local" and workers is None:
        workers = 1  # what the config says is of its own engine
    beside = {"name": engine, "workers": workers, "address": address}
    given = {name: value for name, value in beside.items() if value is not None}
    try:
        how = EngineConfig.model_validate(read.engine.model_dump() | given)
    except ValidationError as error:
        first = error.errors()[0]
        raise SweepError(f"engine: {first['loc'][0]}: {first['msg']}.") from None
    if how.address is not None and how.name != "ray":
        raise SweepError(f"address belongs to Ray, and the engine is {how.name}; add --engine ray.")
    folder = read.out if out is None else require_path("out", out).expanduser()
    if folder is None:
        raise SweepError(
            "a sweep needs a folder for its results: out in the config, --out DIR, in Python out=."
        )
    if folder.exists() and not folder.is_dir():
        raise SweepError(f"{folder} is a file; name a folder for the sweep.")
    read = replace(read, engine=how)
    return SweepJob(read, tuple(cells_of(read)), folder)


def plan(
    config: Given,
    *,
    out: str | Path | None = None,
    engine: str | None = None,
    workers: int | None = None,
    address: str | None = None,
) -> SweepPlan:
    """What :func:`sweep` would run, and about what it takes; takes the same arguments.

    Raises:  SweepError and others: what :func:`sweep` refuses for the config's sake.
    """
    asked = understood(config, out=out, engine=engine, workers=workers, address=address)
    require_models(asked.cells)
    return plan_of(asked.cells, asked.config.engine, asked.folder)


def _run(engine: Engine, asked: SweepJob, *, quiet: bool) -> None:
    how, waiting = asked.config.engine, _waiting(asked)
    session = uuid.uuid4().hex
    write_atomically(asked.folder / SESSION, session)
    works = [
        Work.of(asked.folder, part, session=session, retries=how.retries)
        for part in parts_of(waiting, how.workers)
    ]
    with watching(asked.folder, asked.cells, session, quiet=quiet):
        engine.run(works)


def _say_left_out(asked: SweepJob) -> None:
    """An earlier config's cells stay on disk, but are in no table any more."""
    if not (asked.folder / RECORD).exists():
        return
    with contextlib.suppress(ResultError):
        now = {cell.id for cell in asked.cells}
        gone = [row for row in read_sweep(asked.folder).cells if row.cell not in now]
        if gone:
            remark(
                f"note: {len(gone)} cells of the last config in {asked.folder} are not in this "
                "one; their files stay, and they leave the tables."
            )


def _waiting(asked: SweepJob) -> list[SweepCell]:
    rows = rows_of(asked.folder, asked.cells)
    return [cell for cell, row in zip(asked.cells, rows, strict=True) if row.status != "done"]


def _record(asked: SweepJob) -> Callable[[Sequence[CellRow]], SweepReport]:
    how, rows = asked.config.engine, list(rows_of(asked.folder, asked.cells))
    made = SweepReport(
        folder=str(asked.folder),
        engine=how.name,
        workers=how.workers,
        cells=tuple(rows),
        versions=versions(),
        command=command_line(),
        created=datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat(),
    )
    return lambda rows: made.model_copy(update={"cells": tuple(rows)}) if rows else made


def _make(folder: Path) -> None:
    """Refuse a folder that cannot be written, or that holds something else."""
    try:
        (real_path(folder) / CELLS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror}.") from None
    if (folder / RECORD).exists():
        try:
            found = load_result(folder / RECORD)
        except ResultError:
            return  # a damaged list is written again; each cell keeps its own state
        if not isinstance(found, SweepReport):
            raise SweepError(f"{folder / RECORD} is not of a sweep; choose another --out.")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One sweep a folder at a time: two would run the same cells."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise OutputError(
            f"another sweep is at work in {brief(str(folder), 80)}; wait for it, or choose another "
            "--out."
        ) from None
    except OSError as error:
        raise OutputError(f"cannot write into {folder}: {error.strerror or error}.") from None
    try:
        yield
    finally:
        lock.release()
