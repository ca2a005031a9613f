"""What a worker does, whoever started it: cells one after the other, each kept as it ends."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melens.errors import COULD_NOT_RUN, INTERRUPTED, OutputError, ResultError
from melens.formatting import LAYOUT, printable
from melens.protocols import HookedModel, JsonObject
from melens.results.sweep import CellRow
from melens.store import write_atomically
from melens.store.disk import PAGE, read_text
from melens.sweeping.cells import SweepCell
from melens.sweeping.tables import keep_rows

if TYPE_CHECKING:
    from melens.cli.app import Ended

CELLS, STATE, LOG, OUT, LOCK = "cells", "cell.json", "log.txt", "out", ".lock"
RESULT = "result.json"
"""Names in a sweep's folder."""
SIZES = ("batch_size", "batch_tokens")
"""Options that are halved where memory runs out."""


@dataclass(frozen=True)
class Work:
    """Cells for one worker; plain values, so that it can be sent anywhere."""

    folder: str
    cells: tuple[JsonObject, ...]
    session: str
    """The sweep that sent it: a worker lost in another one does not count here."""
    retries: int = 3
    threads: int | None = None

    @classmethod
    def of(
        cls, folder: Path, cells: Sequence[SweepCell], *, session: str, retries: int = 3
    ) -> Work:
        """For these cells."""
        return cls(str(folder.resolve()), tuple(asdict(cell) for cell in cells), session, retries)


class LastModel:
    """Gives a command its model: the last one again, where the next command asks for the same."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[object, ...], HookedModel] | None = None
        """What was asked for, and what was given for it."""

    def __call__(self, model: str, **how: Any) -> HookedModel:
        """The model, loaded by :func:`melens.models.load`."""
        from melens.models import load

        asked = (model, *sorted(how.items()))
        if self._kept is None or asked != self._kept[0]:
            self.forget()
            self._kept = asked, load(model, **how)
        return self._kept[1]

    def forget(self) -> None:
        """Its memory is free for another one."""
        self._kept = None
        gc.collect()


def run_work(work: Work, *, told: Callable[[CellRow], None] | None = None) -> None:
    """Run those of the cells that are not done yet.

    Args:    told: called with each row that is new.
    Raises:  KeyboardInterrupt: after the cell it met has gone back to those that are missing.
    """
    from melens.cli.job import LOADER
    from melens.cli.output import DRAWS

    models = LastModel()
    before, drawn = LOADER.set(models), DRAWS.set(False)
    try:
        with _threads(work.threads):
            for given in work.cells:
                cell = SweepCell(**{**given, "argv": tuple(given["argv"])})
                row = _run_once(Path(work.folder), cell, work, models)
                if row is not None and told is not None:
                    told(row)
    finally:
        LOADER.reset(before)
        DRAWS.reset(drawn)
        models.forget()


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """As many of torch's threads as a worker has cores; None = as they are."""
    if count is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_once(folder: Path, cell: SweepCell, work: Work, models: LastModel) -> CellRow | None:
    """Run a cell that is neither done, nor failed in this sweep."""
    home = folder / CELLS / cell.id
    with _alone(home):
        return _run_unless_done(folder, cell, work, models)


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """One worker a cell: one that an earlier sweep left behind on another machine may be at it."""
    from filelock import FileLock

    home.mkdir(parents=True, exist_ok=True)
    lock = FileLock(home / LOCK)
    try:
        lock.acquire()
    except OSError:  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _run_unless_done(
    folder: Path, cell: SweepCell, work: Work, models: LastModel
) -> CellRow | None:
    home = folder / CELLS / cell.id
    state = read_state(home)
    ours = state.get("session") == work.session
    before = row_of(home)
    if before is not None and (before.status == "done" or ours):
        return None
    lost = int(state.get("begun", 0)) if ours else 0
    if lost > work.retries:
        said = (
            f"its worker was lost {lost} times (out of memory, killed, or over a job's time "
            f"limit); see {LOG}."
        )
        return _end(home, _row(cell, "failed", error=said), work.session)
    _write_state(home, {"status": "running", "session": work.session, "begun": lost + 1})
    try:
        row = run_cell(folder, cell, models)
    except BaseException:  # an interrupt is no loss of the cell's own
        _write_state(home, {"status": "interrupted"})
        raise
    return _end(home, row, work.session)


def run_cell(folder: Path, cell: SweepCell, models: LastModel | None = None) -> CellRow:
    """Run one cell and keep the rows of its result; what goes wrong is said in its row."""
    home, start = folder / CELLS / cell.id, time.monotonic()
    (home / OUT).mkdir(parents=True, exist_ok=True)
    argv, notes = [*cell.argv, "--json", "--out", str(home / OUT)], []
    ended, printed = _attempt(argv, home / LOG)
    smaller = _halved(cell) if ended.out_of_memory else None
    if smaller is not None:
        if models is not None:
            models.forget()
        _free_memory()
        words, note = smaller
        notes.append(f"out of memory; run again with {note}")
        ended, printed = _attempt([*words, *argv[len(cell.argv) :]], home / LOG)
    made: JsonObject = {"error": ended.error, "exit_code": ended.code}
    if not ended.error:
        made |= _kept_result(folder, cell, printed)
    if ended.code == COULD_NOT_RUN and not made["error"]:
        made["error"] = f"not run in full: {made.get('summary', '')}"
    return _row(
        cell,
        "failed" if made["error"] else "done",
        notes=tuple(notes),
        seconds=round(time.monotonic() - start, 3),
        **made,
    )


def _attempt(argv: list[str], log: Path) -> tuple[Ended, str]:
    """How a command ended, and what it printed; notes and progress go to the log."""
    from melens.cli.app import Ended, attempt

    printed, typed = io.StringIO(), sys.argv
    with log.open("a", encoding="utf-8") as noted:
        noted.write(printable(f"$ melens {' '.join(argv)}\n", keep=LAYOUT))
        sys.argv = ["melens", *argv]  # what results record as their command
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(noted):
                ended = attempt(argv)
        except SystemExit as error:  # a library's, or a model's own code
            ended = Ended(COULD_NOT_RUN, f"could not run ({type(error).__name__}: {error}).")
        finally:
            sys.argv = typed
        if ended.code == INTERRUPTED:
            raise KeyboardInterrupt
        if ended.error:
            noted.write(printable(f"{ended.error}\n", keep=LAYOUT))
    return ended, printed.getvalue()


def _kept_result(folder: Path, cell: SweepCell, printed: str) -> JsonObject:
    """Keep the rows of what a command printed; what its row says of it."""
    from melens.results.base import kind_of, schema_of

    try:
        kind = kind_of(schema_of(printed, "what the command printed"))
        if kind is None:
            raise ResultError("it printed no result.")
        result = kind.validated(printed)
        file = _file_of(folder / CELLS / cell.id, printed)
        keep_rows(folder, cell, result)
    except OutputError:
        raise
    except Exception as error:  # Parquet refuses what no column can hold
        return {"error": f"no result: {error}"}
    kept = str(file.relative_to(folder))
    return {"kind": kind.schema_id.split("/")[1], "summary": result.summary(), "result": kept}


def _file_of(home: Path, printed: str) -> Path:
    """The file that holds what was printed; where a command keeps it in none, one beside them."""
    for path in sorted((home / OUT).glob("*.json")):
        if path.read_text("utf-8").strip() == printed.strip():
            return path
    write_atomically(home / RESULT, printed)
    return home / RESULT


def _halved(cell: SweepCell) -> tuple[list[str], str] | None:
    """The command with half its batch, and what to say of it; None where it has none to halve."""
    from melens.sweeping.cells import command_of, options_of

    named = {p.name: p for p in options_of(command_of(cell.command, cell.title)).values()}
    given = cell.params()
    words, said = list(cell.argv), []
    for name in SIZES:
        size = given.get(name)
        if name in named and isinstance(size, int) and size > 1:
            option = max(named[name].opts, key=len)
            words.append(f"{option}={size // 2}")  # the last one counts
            said.append(f"{option} {size // 2} instead of {size}")
    return (words, ", ".join(said)) if said else None


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _row(cell: SweepCell, status: str, **found: object) -> CellRow:
    return CellRow.model_validate(
        {
            "cell": cell.id,
            "command": cell.command,
            "model": cell.model,
            "options": cell.options,
            "argv": cell.argv,
            "status": status,
            "machine": platform.node(),
            **found,
        }
    )


def _end(home: Path, row: CellRow, session: str) -> CellRow:
    kept = {"status": row.status, "session": session, "row": row.model_dump(mode="json")}
    _write_state(home, kept)
    return row


def read_state(home: Path) -> JsonObject:
    """How far a cell is; empty where it has not begun, or its file is damaged."""
    try:
        found = json.loads(read_text(home / STATE, PAGE, error=ResultError))
    except (ResultError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def row_of(home: Path) -> CellRow | None:
    """The row of a cell that has ended; None for one that has not."""
    found = read_state(home).get("row")
    try:
        row = None if found is None else CellRow.model_validate(found)
    except ValueError:
        return None
    lost = row is not None and row.result and not (home.parent.parent / row.result).is_file()
    return None if lost else row


def _write_state(home: Path, state: JsonObject) -> None:
    home.mkdir(parents=True, exist_ok=True)
    write_atomically(home / STATE, json.dumps({**state, "pid": os.getpid()}, indent=1) + "\n")


def rows_of(folder: Path, cells: Sequence[SweepCell]) -> Iterator[CellRow]:
    """A row for every cell; those that have not ended are missing."""
    for cell in cells:
        yield row_of(folder / CELLS / cell.id) or _row(cell, "missing", machine=None)
