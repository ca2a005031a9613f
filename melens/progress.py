"""Progress on stderr, whoever reads it: a bar on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from melens.formatting import LAYOUT, printable

if TYPE_CHECKING:
    from tqdm import tqdm

EVERY = 5.0
"""Seconds between two lines: often enough to see that it lives, seldom enough for a log."""
LEAST_SHARE = 0.05
"""Of the work, below which a guess of the time that is left says nothing."""


HUSHED = threading.Event()
"""Set while a command runs with --quiet: no notes and no progress. Errors are still told."""


BARS = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")
"""Environment variables that other libraries look at."""
_SAID: set[str] = set()


def hush() -> None:
    """From here on say nothing but errors; other libraries' bars are off too."""
    HUSHED.set()
    if sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty():
        os.environ.update(dict.fromkeys(BARS, "1"))


def is_quiet() -> bool:
    """Whether nothing but results and errors is to be said."""
    return HUSHED.is_set()


@contextmanager
def one_command() -> Iterator[None]:
    """What one command was told to keep silent about, the next one says again; a command that
    runs others stays as it was told.
    """  # noqa: D205
    hushed = HUSHED.is_set()
    try:
        with restored(BARS):
            yield
    finally:
        if not hushed:
            HUSHED.clear()


@contextmanager
def restored(names: Iterable[str]) -> Iterator[None]:
    """Restore these environment variables after the block."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def only_errors_of(library: str) -> Iterator[None]:
    """Without a library's warnings: melens says what they are about."""
    logger = logging.getLogger(library)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def remark(text: str) -> None:
    """What ends nothing, said as :func:`tell` does; silent with --quiet."""
    if not HUSHED.is_set():
        tell(text)


def say_once(text: str) -> None:
    """A note on stderr, once a process: one command opens a folder several times."""
    if text not in _SAID and not HUSHED.is_set():
        _SAID.add(text)
        remark(f"note: {text}")


def tell(text: str) -> None:
    """A line on stderr, under melens' name; where nobody reads, the work goes on."""
    try:
        sys.stderr.write(f"melens: {printable(text, keep=LAYOUT)}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        discard(sys.stderr)


def discard(stream: IO[Any]) -> None:
    """Drop what a stream still holds: Python would write it at exit, fail, and end with 120."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@dataclass
class Display:
    """Work that counts up to a total; a callback, which may be told what it is at."""

    unit: str | None
    """What is counted; None where it is only a share of the whole."""
    what: str | None = None
    """The part of the work that is going on."""
    done: int = 0
    total: int = 0
    start: float = field(default_factory=time.monotonic)

    def __call__(self, done: int, total: int, what: str | None = None) -> None:
        """``done`` of ``total`` are finished."""
        self.done, self.total = done, total
        if what is not None and what != self.what:
            self.what = what
            self.tell()
        self.moved()

    def tell(self) -> None:
        """Say where it is."""

    def moved(self) -> None:
        """The counts changed."""

    def close(self) -> None:
        """The work is over, or was interrupted."""


class Lines(Display):
    """For a file, a pipe or a log: one plain line."""

    def tell(self) -> None:
        """As a line of its own."""
        tell(self.line(time.monotonic() - self.start))

    def line(self, seconds: float) -> str:
        """What is done, how long it took, and about how much longer it will."""
        share = self.done / self.total if self.total else 0.0
        parts = [f"{seconds:.0f} s so far"]
        if self.total:
            parts.insert(0, f"{100 * share:.0f} %")
        if self.unit is not None:
            count = f"{self.done:,} of {self.total:,} " if self.total else ""
            parts.insert(0, f"{count}{self.unit}")
        if LEAST_SHARE <= share < 1:
            parts.append(f"about {seconds * (1 / share - 1):.0f} s left")
        return f"{self.what}: {', '.join(parts)}" if self.what else ", ".join(parts)


class Bar(Display):
    """For a terminal: tqdm's bar."""

    shown: tqdm | None = None

    def moved(self) -> None:
        """Drawn at most ten times a second."""
        if self.shown is None:
            self.shown = _tqdm(self.unit)
        self.shown.total = self.total
        if self.what:
            self.shown.set_description_str(self.what, refresh=False)
        self.shown.update(self.done - self.shown.n)

    def tell(self) -> None:
        """The clock goes on while nothing is counted."""
        if self.shown is not None:
            self.shown.refresh()

    def close(self) -> None:
        """The last state stays on the screen."""
        if self.shown is not None:
            self.shown.close()


@contextmanager
def progress_on(unit: str | None, *, what: str | None = None) -> Iterator[Display]:
    """Show work on stderr: call what this gives with (done, total).

    A thread says where it is every few seconds, so that a long step is no silence.

    Args:    unit: what is counted, as "sequences"; None = only a share of the whole.
             what: what is going on, as "isolate"; may change with every call.
    """
    if HUSHED.is_set():
        yield Display(unit, what)
        return
    made = (Bar if _draws_bars() else Lines)(unit, what)
    over = threading.Event()
    beat = threading.Thread(target=_beat, args=(made, over), name="progress", daemon=True)
    beat.start()
    try:
        yield made
    finally:
        over.set()
        beat.join()
        made.close()


def _draws_bars() -> bool:
    """Whether stderr is a terminal that a line can be drawn again on; lines say the same."""
    if sys.stderr is None or sys.stderr.closed or not sys.stderr.isatty():
        return False
    return os.environ.get("TERM") != "dumb" and not os.environ.get("TQDM_DISABLE")


def _beat(made: Display, over: threading.Event) -> None:
    while not over.wait(EVERY):
        made.tell()


def _tqdm(unit: str | None) -> tqdm:
    from tqdm import tqdm

    if unit is None:
        form = "{desc} {percentage:3.0f} %|{bar}| {elapsed}, left {remaining}"
        return tqdm(file=sys.stderr, bar_format=form)
    return tqdm(file=sys.stderr, unit=f" {unit}")
