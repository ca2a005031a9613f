"""The command line: parse, call, print. torch is imported inside the commands only."""

from __future__ import annotations

import atexit
import gc
import sys

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """The program ``melens``. As its process ends afterwards, a last collection of garbage, which
    takes over a second, is skipped; whoever gives arguments looks after a process of their own.
    """  # noqa: D205
    if arguments is None:
        atexit.register(gc.freeze)
    try:
        from melens.cli import app
    except KeyboardInterrupt:  # nothing has begun
        sys.exit(130)
    app.main(arguments)
