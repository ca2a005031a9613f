"""What a section of the page is made of, and the registry of sections, one a kind of result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from melens.errors import ResultError
from melens.figures import FIGURES
from melens.registry import Registry
from melens.reporting.source import Addressed, Linked, number_text, token_html
from melens.results.base import Result

Shown = Linked | Markup | str
"""A number with its address, a token, or words."""


@dataclass(frozen=True)
class Fact:
    """One labelled number or word."""

    label: str
    value: Shown


@dataclass(frozen=True)
class Picture:
    """A result's figure in one of its styles."""

    result: Result
    style: str | None
    alt: str
    """What it shows, with the numbers that matter: for whoever cannot see it."""
    caption: str
    narrow: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under a caption; the first cell of a row names it."""

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Shown]]
    folded: bool = False
    """Behind a summary, for tables that only some want."""


@dataclass(frozen=True)
class Panel:
    """One interactive drawing of heads."""

    label: str
    html: Markup


@dataclass
class PageBlock:
    """What the page says about one result."""

    name: str
    """Its name in the report."""
    sentence: str
    facts: list[Fact] = field(default_factory=list)
    tiles: list[Fact] = field(default_factory=list)
    """For the top of the page."""
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PageView:
    """One result about to be shown: its numbers by address."""

    source: Addressed
    name: str
    result: Any
    index: int = 0
    """Of the result in the report: for ids."""

    @property
    def at(self) -> str:
        """Pointer of the result."""
        return f"/results/{self.name.replace('~', '~0').replace('/', '~1')}"

    def number(self, path: str, style: str = "plain", unit: str = "") -> Linked:
        """A number of this result, by a pointer relative to it."""
        return self.source.number(self.at + path, style, unit)

    def numbers(self, path: str, *keys: str, style: str = "plain") -> list[Linked]:
        """Several fields of the object at ``path``."""
        return [self.number(f"{path}/{key}", style) for key in keys]

    def interval(self, path: str) -> Linked:
        """An interval of this result."""
        return self.source.interval(self.at + path)

    def link(self, path: str, text: str) -> Linked:
        """Words that lead to a place of this result."""
        return self.source.link(self.at + path, text)

    def token(self, text: str) -> Markup:
        """A token of the model's."""
        return token_html(text)

    def block(self) -> PageBlock:
        """A block that starts with the result's own sentence."""
        return PageBlock(self.name, self.result.summary())


@dataclass(frozen=True)
class Section:
    """How one kind of result appears."""

    id: str
    title: str
    lead: str
    """What the section is about, for someone new to it."""
    kind: type[Result]
    make: Callable[[PageView], PageBlock]


SECTIONS: Registry[Section] = Registry("section")


def section(
    id: str, title: str, lead: str, kind: type[Result]
) -> Callable[[Callable[[PageView], PageBlock]], Callable[[PageView], PageBlock]]:
    """Register what a kind of result looks like; sections appear in this order."""

    def add(make: Callable[[PageView], PageBlock]) -> Callable[[PageView], PageBlock]:
        SECTIONS.register(id)(Section(id, title, lead, kind, make))
        return make

    return add


MOST_ROWS = 40


def other(view: PageView) -> PageBlock:
    """What every result can say about itself."""
    made = view.block()
    if type(view.result) in FIGURES:
        made.pictures = [Picture(view.result, None, view.result.summary(), "")]
    try:
        rows = view.result.shown()
    except ResultError:
        return made
    if rows:
        columns = tuple(rows[0])
        cells = [[_cell(row.get(name)) for name in columns] for row in rows[:MOST_ROWS]]
        some = f"{len(cells)} of {len(rows)} rows" if len(rows) > len(cells) else "All rows"
        made.tables = [Table(some, columns, cells, folded=True)]
    return made


def _cell(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(number_text(part) for part in value)
    return "" if value is None else number_text(value)
