"""What a sweep shows while it runs: a live table on a terminal, else a line a finished cell."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from melens.formatting import clipped, printable
from melens.protocols import JsonObject
from melens.sweeping.cells import SweepCell
from melens.sweeping.work import CELLS, read_state

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

EVERY = 0.5
"""Seconds between two looks at the cells."""
MOST = 12
"""Models that the live table lists."""


class Board:
    """The state of every cell, read from the sweep's folder: whoever runs them writes there."""

    def __init__(self, folder: Path, cells: Sequence[SweepCell], session: str) -> None:
        """Look once: what is done already costs no time."""
        self.folder, self.cells, self.session = folder, cells, session
        self.start = time.monotonic()
        self.states = {cell.id: "waiting" for cell in cells}
        self.update()
        self.before = self.count("done")

    def update(self) -> list[tuple[SweepCell, JsonObject]]:
        """Cells that ended since the last look, each with its row."""
        ended = []
        for cell in self.cells:
            if self.states[cell.id] in ("done", "failed"):
                continue
            found = read_state(self.folder / CELLS / cell.id)
            ours = found.get("session") == self.session
            status = found.get("status")
            if status == "done" or (ours and status in ("failed", "running")):
                self.states[cell.id] = str(status)
            if self.states[cell.id] in ("done", "failed"):
                ended.append((cell, found.get("row") or {}))
        return ended

    def count(self, state: str, model: str | None = None) -> int:
        """Cells in that state, of one model or all."""
        return Counter(self.states[cell.id] for cell in self.cells if model in (None, cell.model))[
            state
        ]

    def left(self) -> str:
        """About how long it takes still; empty before the first cell has ended."""
        ended = self.count("done") + self.count("failed") - self.before
        if not ended:
            return ""
        rest = (len(self.cells) - self.before - ended) / ended * (time.monotonic() - self.start)
        return f"about {_time(rest)} left" if rest else ""

    def lines(self) -> Iterator[str]:
        """One for each cell that has ended since the last look."""
        ended = self.update()
        before = self.count("done") + self.count("failed") - len(ended)
        for number, (cell, row) in enumerate(ended, before + 1):
            yield self._line(number, cell, row)

    def _line(self, number: int, cell: SweepCell, row: JsonObject) -> str:
        how = f"done in {row.get('seconds') or 0:.1f} s"
        if self.states[cell.id] == "failed":
            how = f"failed: {clipped(row.get('error', ''), 200)}"
        notes = "".join(f"; {note}" for note in row.get("notes", ()))
        left = f"; {said}" if (said := self.left()) else ""
        return f"{number} of {len(self.cells)} cells: {cell.title}: {how}{notes}{left}"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def watching(
    folder: Path, cells: Sequence[SweepCell], session: str, *, quiet: bool = False
) -> Iterator[None]:
    """Show the cells while they run, whatever runs them."""
    if quiet or sys.stderr is None or sys.stderr.closed:
        yield
        return
    board, over = Board(folder, cells, session), threading.Event()
    stream = sys.stderr  # cells have their own while they run
    live = _live(stream) if stream.isatty() else None
    beat = threading.Thread(target=_watch, args=(board, over, stream, live), daemon=True)
    beat.start()
    try:
        yield
    finally:
        over.set()
        beat.join()


def _live(stream: TextIO) -> Live:
    from rich.console import Console
    from rich.live import Live

    console = Console(file=stream, highlight=False)
    return Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)


def _watch(board: Board, over: threading.Event, stream: TextIO, live: Live | None) -> None:
    if live is None:
        while not over.wait(EVERY):
            _write(board, stream)
        _write(board, stream)
        return
    with contextlib.suppress(OSError, ValueError), live:  # the terminal may go away
        last = False
        while not last:
            last = over.wait(EVERY)
            board.update()
            live.update(table_of_board(board), refresh=True)


def _write(board: Board, stream: TextIO) -> None:
    try:
        for line in board.lines():
            stream.write(f"melens: {printable(line)}\n")
        stream.flush()
    except (OSError, ValueError):  # nobody reads it any more
        return


def table_of_board(board: Board) -> Table:
    """One row a model: cells done, running, failed, waiting."""
    from rich.table import Table
    from rich.text import Text

    states = ("done", "running", "failed", "waiting")
    said = board.left()
    made = Table(box=None, pad_edge=False, caption=said or None, caption_justify="left")
    for name in ("model", *states):
        made.add_column(name, justify="left" if name == "model" else "right")
    models = list(dict.fromkeys(cell.model for cell in board.cells))
    open_ones = [m for m in models if board.count("done", m) < _all(board, m)]
    shown = (open_ones + [m for m in models if m not in open_ones])[:MOST]
    for model in shown:
        made.add_row(Text(printable(model)), *(str(board.count(s, model)) for s in states))
    if len(models) > len(shown) or len(models) > 1:
        made.add_row("all", *(str(board.count(state)) for state in states))
    return made


def _all(board: Board, model: str) -> int:
    return sum(cell.model == model for cell in board.cells)
