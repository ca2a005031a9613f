"""Numbers with an address: what the page prints is read from the report by JSON pointer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from melens.reporting.text import number_text, page_text
from melens.results.pointer import look_up

ROOT = "json"


@dataclass(frozen=True)
class Linked:
    """A text that leads to its place in the JSON below the page."""

    pointer: str
    text: str

    def __html__(self) -> Markup:
        link = Markup('<a class="n" href="#{}">{}</a>')
        return link.format(anchor(self.pointer), page_text(self.text))

    def __str__(self) -> str:
        return self.text


class Source:
    """A report as plain JSON, and the pointers that were taken from it."""

    def __init__(self, data: dict[str, Any]):
        self.data = data
        self.taken: set[str] = set()

    def at(self, pointer: str) -> Any:
        """What an RFC 6901 pointer names.

        Raises:  ResultError: nothing is there.
        """
        return look_up(self.data, pointer)

    def number(self, pointer: str, style: str = "plain", unit: str = "") -> Linked:
        """The number there, in words of :func:`number_text`, with its unit."""
        text = number_text(self.at(pointer), style)
        return self.link(pointer, f"{text} {unit}" if unit else text)

    def interval(self, pointer: str, style: str = "signed") -> Linked:
        """A pair of numbers there, as "low to high"."""
        pair = self.at(pointer)
        ends = None if pair is None else [number_text(end, style) for end in pair]
        return self.link(pointer, "none" if ends is None else " to ".join(ends))

    def link(self, pointer: str, text: str) -> Linked:
        """Words of one's own for what is there."""
        self.at(pointer)
        self.taken.add(pointer)
        return Linked(pointer, text)


def anchor(pointer: str) -> str:
    """The id of a pointer's place on the page: no spaces, and nothing a browser reads otherwise."""
    return ROOT + quote(pointer, safe="/~.-_")


def step(key: str | int) -> str:
    """One part of a pointer, escaped."""
    return "/" + str(key).replace("~", "~0").replace("/", "~1")
