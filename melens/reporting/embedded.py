"""The report's JSON as readable HTML, with an id at every place that the page links to."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from melens.reporting.source import anchor, step

LINE = 160
"""Characters that an object or list may have to stand on one line."""
HEAD = 12
"""Entries of a cut list that stay besides the linked ones."""
LIST = 60
"""A list is cut only from this length on."""


@dataclass(frozen=True)
class Piece:
    """One part of the report: its pointer, its HTML, and whether lists in it were cut."""

    pointer: str
    html: Markup
    cut: bool


def pieces(data: dict[str, Any], taken: set[str], most: int) -> list[Piece]:
    """The report itself, then result by result; all of it, unless that makes too large a page.

    Args:    taken: pointers that get an id.
             most: characters of JSON; beyond, the long lists of the largest results are cut to
                 what is linked.
    """
    parts: dict[str, Any] = {"": {key: data[key] for key in data if key != "results"}}
    parts |= {f"/results{step(key)}": value for key, value in data["results"].items()}
    sizes = {pointer: len(_json(value)) for pointer, value in parts.items()}
    made = []
    for pointer, value in parts.items():
        cut = bool(pointer) and _over(pointer, sizes, most)
        made.append(Piece(pointer, Markup(_Writer(taken, cut).write(value, pointer)), cut))
    return made


def _over(pointer: str, sizes: dict[str, int], most: int) -> bool:
    """Whether this part is one of the largest, which together make the page too large."""
    total = sum(sizes.values())
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        if total <= most:
            return False
        if name == pointer:
            return True
        total -= sizes[name]
    return False


class _Writer:
    """Escaped JSON text; each linked place in a span with its id."""

    def __init__(self, taken: set[str], cut: bool):
        self.taken, self.cut = taken, cut
        self.above = {
            pointer[:i] for pointer in taken for i, letter in enumerate(pointer) if letter == "/"
        }

    def write(self, value: Any, pointer: str, indent: str = "") -> str:
        text = self._value(value, pointer, indent)
        if pointer in self.taken:
            return f'<span id="{anchor(pointer)}">{text}</span>'
        return text

    def _value(self, value: Any, pointer: str, indent: str) -> str:
        if not isinstance(value, dict | list) or not value:
            return _escaped(value)
        whole = _json(value)
        plain = all(not isinstance(part, dict | list) for part in _parts(value))
        one_line = len(whole) <= LINE or (plain and isinstance(value, list))
        long = self.cut and isinstance(value, list) and len(value) > LIST
        if one_line and not long and pointer not in self.above:
            return html.escape(whole, quote=False)
        inner = "" if one_line else f"{indent} "
        written = self._entries(value, pointer, inner, long)
        start, end = "{}" if isinstance(value, dict) else "[]"
        if one_line:
            return f"{start}{', '.join(written)}{end}"
        body = f",\n{inner}".join(written)
        return f"{start}\n{inner}{body}\n{indent}{end}"

    def _entries(self, value: Any, pointer: str, indent: str, long: bool) -> list[str]:
        if isinstance(value, dict):
            return [
                f"{_escaped(key)}: {self.write(value[key], pointer + step(key), indent)}"
                for key in sorted(value)
            ]
        places = [f"{pointer}/{i}" for i in range(len(value))]
        kept = [
            i for i, place in enumerate(places)
            if not long or i < HEAD or place in self.taken or place in self.above
        ]  # fmt: skip
        written = [self.write(value[i], places[i], indent) for i in kept]
        if left := len(value) - len(kept):
            written.append(_escaped(f"... {left} of {len(value)} entries: see report.json"))
        return written


def _parts(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _escaped(value: Any) -> str:
    return html.escape(_json(value), quote=False)
