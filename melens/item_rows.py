"""One JSON line an item and condition, on disk as soon as it is known: what a kill leaves."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from melens.errors import ResultError
from melens.protocols import JsonObject
from melens.store import (
    RESULT,
    Heading,
    KeptRows,
    Refusal,
    RowFormat,
    hash_facts,
    json_object,
    open_regular,
)

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
    about: JsonObject = field(default_factory=dict)
    """What was asked and answered: prompt, answer, gold, lengths."""


FOREIGN = "{path} is not a file of items; choose another folder."
DAMAGED = "{path} is damaged; delete it to start again, or choose another folder."


class Rows(KeptRows[tuple[str, str], ItemRow]):
    """Finished rows by item and condition."""

    def __init__(self, path: Path | None, facts: JsonObject, *, of: str = "evaluation") -> None:
        """Take up an earlier run's rows, or begin the file.

        Args:    facts: what the numbers depend on; kept in the file's first line.
                 of: what the rows are finished parts of, for the refusal.
        Raises:  ResultError: the file is of another evaluation, or no such file.
        """
        self.key = hash_facts(facts)
        other = (
            f"{{path}} is of another {of} (other weights, items, edits or version of melens); "
            "delete it to start again, or choose another folder."
        )
        form = RowFormat(_name, _line, _row, Refusal(DAMAGED, FOREIGN, other))
        super().__init__(path, form, Heading(SCHEMA, self.key, facts))

    def has(self, item: str, condition: str) -> bool:
        """Whether an earlier run finished it."""
        return (item, condition) in self.found

    def of(self, condition: str) -> dict[str, ItemRow]:
        """Item -> row of one condition, in the order in which they were found."""
        return {item: row for (item, name), row in self.found.items() if name == condition}


def head_of(path: Path) -> JsonObject:
    """The first line of a file of items: its key, and what its numbers depend on.

    Raises:  ResultError: it cannot be read, or is not a file of items.
    """
    try:
        with open_regular(path) as file:
            found = json_object(file.readline(RESULT).decode("utf-8", errors="replace"))
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror or error}.") from None
    if found is None:
        raise ResultError(DAMAGED.format(path=path))
    if found.get("schema") != SCHEMA:
        raise ResultError(FOREIGN.format(path=path))
    return found


def _name(row: ItemRow) -> tuple[str, str]:
    return row.item, row.condition


def _line(row: ItemRow) -> str:
    return json.dumps(asdict(row), allow_nan=False)


def _row(line: str) -> ItemRow:
    """The row that a line holds.

    Raises:  ValueError: it holds none that :func:`_line` wrote.
    """
    data = json.loads(line)
    try:
        pairs = {str(name): (pair[0], pair[1]) for name, pair in data["also"].items()}
        row = ItemRow(**{**data, "also": pairs})
    except (TypeError, KeyError, AttributeError, IndexError):
        raise ValueError("not the fields of a row") from None
    numbers = (row.value, row.weight, *(number for pair in pairs.values() for number in pair))
    texts, about = (row.item, row.condition), row.about
    fits = all(isinstance(text, str) for text in texts) and isinstance(about, dict)
    if not (fits and all(map(_is_plain_number, numbers))):
        raise ValueError("a field of another type")
    return row


def _is_plain_number(value: object) -> bool:
    """What :func:`json.dumps` writes of a finite float or a small whole number."""
    if not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= 2**53
