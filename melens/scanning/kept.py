"""Scanned layers on disk, one line each, so that an interrupted scan goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path

from melens.errors import OutputError, ResultError
from melens.scanning.neurons import LayerScan
from melens.store import RESULT, read_limited, write_atomically

SCHEMA = "melens/scan-layers/1"


class Kept:
    """Finished layers by number; on disk if there is a path.

    A file of other weights, or one that is damaged, is begun anew: a scan is cheap, and the
    user's --out may hold an older model's. A torn last line (a kill) costs its one layer.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        """Take up what ``path`` holds, if it is of this ``key``.

        Raises:  OutputError: the file cannot be written. ResultError: it cannot be read.
        """  # fmt: skip
        self.path = path
        self.layers: dict[int, LayerScan] = {}
        if path is None:
            return
        if not self._read(path, key):
            self.layers = {}
            write_atomically(path, json.dumps({"schema": SCHEMA, "key": key}) + "\n")

    def add(self, found: LayerScan) -> None:
        """Keep a layer; it is on disk when this returns.

        Raises:  OutputError: the file cannot be written.
        """
        self.layers[found.row.layer] = found
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(found.model_dump_json() + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}.") from None

    def _read(self, path: Path, key: str) -> bool:
        if not path.exists():
            return False
        try:
            text = read_limited(path, RESULT).decode("utf-8", errors="replace")
        except OSError as error:
            raise ResultError(f"cannot read {path}: {error.strerror or error}.") from None
        head, *lines = text.split("\n")
        try:
            if json.loads(head) != {"schema": SCHEMA, "key": key}:
                return False
            for line in lines[:-1]:
                found = LayerScan.model_validate_json(line)
                self.layers[found.row.layer] = found
        except (ValueError, RecursionError):
            return False
        if lines and lines[-1]:  # else the next layer would be written behind the torn part
            write_atomically(path, text[: -len(lines[-1])])
        return bool(lines)
