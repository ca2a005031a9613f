"""Standard output of a command whose reader has left, or whose disk is full."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import IO

from melens.errors import OutputError


class Printed:
    """A stream that a command prints to. Where its reader has left, the rest goes nowhere and the
    command ends as it would have.
    """  # noqa: D205

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._fault: OutputError | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text.

        Raises:  OutputError: it cannot be written, as on a full disk.
        """
        with self._faults():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is left; raises as :meth:`write` does."""
        with self._faults():
            self._stream.flush()

    @contextmanager
    def _faults(self) -> Iterator[None]:
        if self._fault is not None:  # again, as typer tries a stream and drops what it says
            raise self._fault
        try:
            yield
        except BrokenPipeError:
            discard(self._stream)
        except OSError as error:
            discard(self._stream)
            said = f"cannot write to standard output: {error.strerror}; send it somewhere else."
            self._fault = OutputError(said)
            raise self._fault from None


@contextmanager
def printing() -> Iterator[None]:
    """Inside the block stdout is :class:`Printed`."""
    if sys.stdout is None:  # closed by whoever started the program
        yield
        return
    with redirect_stdout(Printed(sys.stdout)):
        yield


def discard(stream: IO[str]) -> None:
    """Drop what a stream still holds. Python would write it as it exits, and where that fails end
    with an exit code of its own.
    """  # noqa: D205
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
