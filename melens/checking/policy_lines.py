"""A policy file read with the line of every key, so that an error can say where it is."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melens.errors import PolicyError
from melens.store import read_limited

Keys = tuple[str, ...]
LARGEST = 64_000
"""Bytes; a policy is a page."""
WIDEST = 500
"""Characters of a line: a dotted key of thousands of parts takes the library minutes."""
DEEPEST = 4
"""A policy has rules.NAME.threshold; what is deeper is an error anyway."""
_AT_LINE = re.compile(r"\(at line (\d+), column \d+\)")


@dataclass(frozen=True)
class Parsed:
    """A file's content, and where its keys stand."""

    path: Path
    data: dict[str, Any]
    lines: dict[Keys, int]
    """Path of keys -> line, counted from 1."""

    def place(self, where: Keys) -> str:
        """File and line of a key; of what it is in, where the key itself has none."""
        for end in range(min(len(where), DEEPEST), 0, -1):
            if where[:end] in self.lines:
                return f"{self.path}, line {self.lines[where[:end]]}"
        return str(self.path)


def parsed(path: Path) -> Parsed:
    """Read a TOML file.

    Raises:  PolicyError: it cannot be read, or is not valid TOML.
    """
    try:
        raw = read_limited(path, LARGEST)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        said = getattr(error, "strerror", None) or error
        raise PolicyError(f"cannot read the policy {path}: {said}.") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise PolicyError(f"{path}, line {line}: not UTF-8; save it as UTF-8 text.") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if len(line) > WIDEST:
            raise PolicyError(
                f"{path}, line {number}: {len(line):,} characters; a policy's lines have at most "
                f"{WIDEST:,}."
            )
    try:
        return Parsed(path, tomllib.loads(text), _lines(text))
    except RecursionError:
        raise PolicyError(f"{path} is nested too deep for a policy.") from None
    except ValueError as error:  # TOMLDecodeError, and a number too long for Python
        said = str(error)
        found = _AT_LINE.search(said)
        line = f", line {found[1] if found else text.count(chr(10)) + 1}"
        said = said.split(" (at ")[0]
        raise PolicyError(f"{path}{line}: not valid TOML ({said[:160]}).") from None


def _lines(text: str) -> dict[Keys, int]:
    """The first line of every key, and of what it is in."""
    found: dict[Keys, int] = {}
    for keys, number in _keys_at(text):
        for end in range(1, len(keys) + 1):
            found.setdefault(keys[:end], number)
    return found


def _keys_at(text: str) -> Iterator[tuple[Keys, int]]:
    """Keys at the start of a line, and tables; each such line is read by the library alone.

    A line inside a longer value may look like a key: it only costs an error its right place.
    """
    table: Keys = ()
    for number, line in enumerate(text.split("\n"), start=1):
        shown = line.strip()
        if shown.startswith("["):
            if keys := _keys(shown):
                table = keys
                yield table, number
        elif "=" in shown and (keys := _keys(f"{shown.partition('=')[0]}=0")):
            yield (*table, *keys), number


def _keys(line: str) -> Keys:
    """The path of the one key that a line holds; empty where it holds none."""
    try:
        data: Any = tomllib.loads(line)
    except (ValueError, RecursionError):
        return ()
    found: list[str] = []
    while isinstance(data, dict | list) and len(data) == 1 and len(found) < DEEPEST:
        if isinstance(data, dict):
            found.append(next(iter(data)))
            data = data[found[-1]]
        else:
            data = data[0]
    return tuple(found)
