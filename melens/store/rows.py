"""Rows of JSON that an interrupted run leaves, and that the same run takes up again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from melens.errors import OutputError, ResultError
from melens.protocols import JsonObject
from melens.store.disk import ROWS, json_object, read_limited, remove_file, write_atomically


@dataclass(frozen=True)
class Refusal:
    """What is said of a file that cannot be taken up; ``{path}`` and ``{line}`` are filled in."""

    damaged: str
    foreign: str = ""
    """It is no file of this kind."""
    other: str = ""
    """Its numbers depend on other facts."""


@dataclass(frozen=True)
class Heading:
    """Of what kept work is: its kind, and a key of all facts that its numbers depend on."""

    schema: str
    key: str
    facts: JsonObject | None = None
    """What the key is of, for whoever reads the file."""

    def fits(self, found: JsonObject | None, refusal: Refusal | None, path: Path) -> bool:
        """Whether what is kept with this head may be taken up; None is no head at all.

        Args:    refusal: None = what does not fit is begun again.
        Raises:  ResultError: it does not fit, and there is a refusal.
        """
        if found is None:
            return _refused(refusal and refusal.damaged, path, line=1)
        if found.get("schema") != self.schema:
            return _refused(refusal and refusal.foreign, path)
        if found.get("key") != self.key:
            return _refused(refusal and refusal.other, path)
        return True

    def line(self) -> str:
        """The first line of a file of rows."""
        of = {} if self.facts is None else {"of": self.facts}
        head = {"schema": self.schema, "key": self.key, **of}
        return json.dumps(head, sort_keys=True, default=str) + "\n"


def _refused(said: str | None, path: Path, line: int = 0) -> bool:
    if said is not None:
        raise ResultError(said.format(path=path, line=line))
    return False


Name = TypeVar("Name", bound=Hashable)
Row = TypeVar("Row")


@dataclass(frozen=True)
class RowFormat(Generic[Name, Row]):
    """How rows of one kind are told apart and stand in a file, a line of JSON each."""

    name: Callable[[Row], Name]
    write: Callable[[Row], str]
    read: Callable[[str], Row | None]
    """None for a row that is of something else; raises ValueError where a line is no row."""
    refusal: Refusal | None
    """None = a file of something else, or a damaged one, is begun again."""


class KeptRows(Generic[Name, Row]):
    """Finished rows by name; on disk, each as soon as it is known, if there is a path.

    An earlier run's are taken up. A torn last line, which a kill leaves, costs its one row.
    """

    def __init__(
        self, path: Path | None, form: RowFormat[Name, Row], heading: Heading | None
    ) -> None:
        """Take up what ``path`` holds, or begin the file.

        Args:    heading: the file's first line; None = it has none, every row says of what it is.
        Raises:  ResultError: the file cannot be read, or is to be refused. OutputError: it cannot
                 be written.
        """
        self.path, self.form, self.heading = path, form, heading
        self.found: dict[Name, Row] = {}
        if path is None or self._take_up(path):
            return
        self.found = {}
        write_atomically(path, "" if heading is None else heading.line())

    def add(self, rows: Iterable[Row]) -> None:
        """Keep rows that are not there yet; they are on disk when this returns.

        Raises:  OutputError: the file cannot be written.
        """
        new = {name: row for row in rows if (name := self.form.name(row)) not in self.found}
        self.found.update(new)
        if self.path is not None and new:
            _append(self.path, "".join(self.form.write(row) + "\n" for row in new.values()))

    def remove(self) -> None:
        """The result is there: what led to it is not needed any more."""
        if self.path is not None:
            remove_file(self.path)

    def _take_up(self, path: Path) -> bool:
        """False where the file is to be begun."""
        try:
            raw = read_limited(path, ROWS) if path.exists() else b""
        except OSError as error:
            raise ResultError(f"cannot read {path}: {error.strerror or error}.") from None
        whole = raw[: raw.rfind(b"\n") + 1]
        lines = list(enumerate(whole.split(b"\n")[:-1], start=1))
        if self.heading is not None:
            if not raw or not self._is_ours(raw.partition(b"\n")[0], len(lines) > 1, path):
                return False
            lines = lines[1:]
        if not all(self._read(line, number, path) for number, line in lines):
            return False
        if whole != raw:  # a kill in the middle of a line
            write_atomically(path, whole)
        return True

    def _is_ours(self, head: bytes, rows: bool, path: Path) -> bool:
        assert self.heading is not None
        found = json_object(head.decode(errors="replace"))
        if found is not None and found.get("schema") == self.heading.schema and not rows:
            return False  # nothing is lost where it is begun again
        return self.heading.fits(found, self.form.refusal, path)

    def _read(self, line: bytes, number: int, path: Path) -> bool:
        try:
            row = self.form.read(line.decode())
        except (ValueError, RecursionError):
            refusal = self.form.refusal
            return _refused(refusal and refusal.damaged, path, number)
        if row is not None:
            self.found[self.form.name(row)] = row
        return True


def _append(path: Path, text: str) -> None:
    """At the end of a file, on disk when this returns."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}.") from None
