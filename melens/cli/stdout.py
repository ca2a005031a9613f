"""Standard output of a command whose reader has left, or whose disk is full."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import IO, Any

from melens.errors import OutputError
from melens.progress import discard


class Printed:
    """A stream that a command prints to. If its reader has left, what follows is dropped and the
    exit code stays.
    """  # noqa: D205

    def __init__(self, stream: IO[Any]) -> None:
        self._stream = stream
        self._fault: OutputError | None = None

    def __getattr__(self, name: str) -> object:
        found = getattr(self._stream, name)
        return Printed(found) if name == "buffer" else found  # typer may wrap it anew

    def writelines(self, lines: Iterable[str | bytes]) -> None:
        """Write each; raises as :meth:`write` does."""
        for line in lines:
            self.write(line)

    def write(self, text: str | bytes) -> int:
        """Write a text, or bytes where this is a buffer.

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
            why = error.strerror or error
            self._fault = OutputError(
                f"cannot write to standard output: {why}; send it somewhere else."
            )
            raise self._fault from None


@contextmanager
def printing() -> Iterator[None]:
    """Inside the block stdout is :class:`Printed`."""
    if sys.stdout is None:  # closed by whoever started the program
        yield
        return
    with redirect_stdout(Printed(sys.stdout)):
        yield
