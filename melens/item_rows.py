"""One JSON line an item and condition, on disk as soon as it is known: what a kill leaves."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from melens.errors import OutputError, ResultError
from melens.store import RESULT, ROWS, open_regular, read_limited, write_atomically

SCHEMA = "melens/items/1"


@dataclass(frozen=True)
class ItemRow:
    """One item under one condition; or one step of a measurement, on one batch of texts."""

    item: str
    condition: str
    value: float
    weight: float
    also: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Further measures: name -> (value, weight)."""
    about: dict[str, Any] = field(default_factory=dict)
    """What was asked and answered: prompt, answer, gold, lengths."""


def key_of(facts: dict[str, Any]) -> str:
    """Short hash of everything that the numbers depend on."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Rows:
    """Finished rows; on disk if there is a path, where an earlier run's are taken up again."""

    def __init__(self, path: Path | None, facts: dict[str, Any], *, of: str = "evaluation") -> None:
        """Take up an earlier run's rows, or begin the file.

        Args:    facts: what the numbers depend on; kept in the file's first line.
                 of: what the rows are finished parts of, for the refusal.
        Raises:  ResultError: the file is of another evaluation, or no such file.
        """
        self.path, self.key, self.kind = path, key_of(facts), of
        self.found: dict[tuple[str, str], ItemRow] = {}
        if path is None:
            return
        if not (path.exists() and path.stat().st_size and self._read(path)):
            head = {"schema": SCHEMA, "key": self.key, "of": facts}
            write_atomically(path, json.dumps(head, sort_keys=True, default=str) + "\n")

    def has(self, item: str, condition: str) -> bool:
        """Whether an earlier run finished it."""
        return (item, condition) in self.found

    def add(self, rows: Iterable[ItemRow]) -> None:
        """Keep rows; they are on disk when this returns.

        Raises:  OutputError: the file cannot be written.
        """
        new = [row for row in rows if not self.has(row.item, row.condition)]
        self.found.update({(row.item, row.condition): row for row in new})
        if self.path is None or not new:
            return
        lines = "".join(json.dumps(asdict(row), allow_nan=False) + "\n" for row in new)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}.") from None

    def of(self, condition: str) -> dict[str, ItemRow]:
        """Item -> row of one condition, in the order in which they were found."""
        return {item: row for (item, name), row in self.found.items() if name == condition}

    def _read(self, path: Path) -> bool:
        """Take up what is there; False where no item was finished, so that nothing is lost."""
        try:
            raw = read_limited(path, ROWS).decode("utf-8", errors="replace")
        except OSError as error:
            raise ResultError(f"cannot read {path}: {error.strerror or error}.") from None
        found = head_of(path)
        whole = raw[: raw.rfind("\n") + 1]
        lines = whole.split("\n")[1:-1]
        if found.get("key") != self.key:
            if not lines:
                return False
            raise ResultError(
                f"{path} is of another {self.kind} (other weights, items, edits or version of "
                "melens); delete it to start anew, or choose another folder."
            )
        if whole != raw:  # a kill in the middle of a line
            write_atomically(path, whole)
        for line in lines:
            row = _row(_json(line, path))
            if row is None:
                raise ResultError(_DAMAGED.format(path))
            self.found[row.item, row.condition] = row
        return True


def head_of(path: Path) -> dict[str, Any]:
    """The first line of a file of items: its key, and what its numbers depend on.

    Raises:  ResultError: it cannot be read, or is not a file of items.
    """
    try:
        with open_regular(path) as file:
            found = _json(file.readline(RESULT).decode("utf-8", errors="replace"), path)
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror or error}.") from None
    if found.get("schema") != SCHEMA:
        raise ResultError(f"{path} is not a file of items; choose another folder.")
    return found


def _row(data: dict[str, Any]) -> ItemRow | None:
    """A line's row; None where it is none that :meth:`Rows.add` wrote."""
    try:
        pairs = {str(name): (pair[0], pair[1]) for name, pair in data["also"].items()}
        row = ItemRow(**{**data, "also": pairs})
    except (TypeError, KeyError, AttributeError, IndexError):
        return None
    numbers = (row.value, row.weight, *(number for pair in pairs.values() for number in pair))
    texts, about = (row.item, row.condition), row.about
    fits = all(isinstance(text, str) for text in texts) and isinstance(about, dict)
    return row if fits and all(map(_is_plain_number, numbers)) else None


def _is_plain_number(value: object) -> bool:
    """What :func:`json.dumps` writes of a finite float or a small whole number."""
    if not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= 2**53


_DAMAGED = "{} is damaged; delete it to start anew, or choose another folder."


def _json(line: str, path: Path) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise ResultError(_DAMAGED.format(path))
    return data
