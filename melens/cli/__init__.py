"""The command line: parse, call, print. torch is imported inside the commands only."""

from __future__ import annotations

import atexit
import gc

from melens.cli import app

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """The program ``melens``, which ends with its process: more than a second would go by in
    looking for garbage among all that was imported.
    """  # noqa: D205
    atexit.register(gc.freeze)
    app.main(arguments)
