"""Finished cells on disk, so that an interrupted sweep goes on where it was."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

from melens.errors import ResultError
from melens.results.base import schema_of
from melens.store import ROWS, read_text, write_atomically

SCHEMA = "melens/patch-cells/1"
SECONDS = 3.0
"""Between two savings: what a power cut may cost."""


class Cells:
    """Values of finished cells by key, one a row of the batch; on disk if there is a path."""

    def __init__(self, path: Path | None, inputs: str) -> None:
        """Go on from ``path`` if it is there.

        Args:    inputs: fingerprint of everything the numbers depend on.
        Raises:  ResultError: the file is of other inputs, or no checkpoint.
        """
        self.path, self.inputs = path, inputs
        self.done: dict[str, list[float]] = {}
        self._saved = time.monotonic()
        self._dirty = False
        if path is not None and path.exists():
            self.done = self._read(path)

    def add(self, found: dict[str, list[float]]) -> None:
        """Take in a finished wave; saves every few seconds."""
        self.done.update(found)
        self._dirty = True
        if time.monotonic() - self._saved > SECONDS:
            self.save()

    def save(self) -> None:
        """Write what is not on disk yet."""
        if self.path is None or not self._dirty:
            return
        data = {"schema": SCHEMA, "inputs": self.inputs, "cells": self.done}
        write_atomically(self.path, json.dumps(data, sort_keys=True, allow_nan=False))
        self._saved, self._dirty = time.monotonic(), False

    def _read(self, path: Path) -> dict[str, list[float]]:
        text = read_text(path, ROWS, error=ResultError, what="the checkpoint")
        if schema_of(text, str(path)) != SCHEMA:
            raise ResultError(f"{path} is no patching checkpoint; choose another path.")
        data = json.loads(text)
        if data.get("inputs") != self.inputs:
            raise ResultError(
                f"the checkpoint {path} is of another sweep (other weights, tokens, sites, metric "
                "or mode); delete it to start anew, or choose another path."
            )
        cells = data.get("cells")
        if not isinstance(cells, dict) or not all(map(_is_values, cells.values())):
            raise ResultError(f"the checkpoint {path} is damaged; delete it to start anew.")
        return cells


def _is_values(found: object) -> bool:
    return isinstance(found, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
        for value in found
    )
