"""All that commands print on stdout: lines, JSON, and tables that fit the terminal."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from melens.cli.listing import Listing, cell
from melens.formatting import LAYOUT, printable

GAP = 2
"""Blanks between two columns."""
MOST_LINES = 3
"""Of a cell, about; a column that needs more goes on in a table below."""
LEAST_ROOM = 20
"""Columns below which no table can be laid out, whatever the terminal says."""
IN_A_FILE = 120
"""Columns at least where stdout is no terminal: a file or a pipe needs no narrow lines."""


def say(text: str) -> None:
    """A line on stdout."""
    typer.echo(printable(text, keep=LAYOUT))


def say_json(value: object) -> None:
    """JSON on stdout, in ASCII: no terminal reads anything else into it."""
    say(json.dumps(value, indent=1))


def show_listings(listings: Iterable[Listing]) -> None:
    """Print captions and tables, as wide as the terminal is, or as COLUMNS says."""
    for one in listings:
        if one.caption or not one.rows:
            say(folded(one.caption))
        if one.rows:
            _show_table(one)


def show_answers_beside(names: Sequence[str], answers: Sequence[str]) -> None:
    """Print long texts in columns of the same width."""
    made = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    for name in names:
        made.add_column(Text(printable(name)), ratio=1)
    made.add_row(*(Text(printable(text, keep=LAYOUT)) for text in answers))
    _print(made, in_a_file=100)


@dataclass(frozen=True)
class Column:
    """One column of a table, as text."""

    name: str
    cells: list[str]
    is_number: bool

    @property
    def cell_width(self) -> int:
        """Of the widest cell, or of the longest word in the header where that is wider."""
        return max(_longest_word(self.name), *map(cell_len, self.cells))

    @property
    def least_width(self) -> int:
        """Of the longest word, which nothing may break, or of a cell folded as often as may be."""
        longest_word = max(map(_longest_word, (self.name, *self.cells)))
        return max(longest_word, -(-self.cell_width // MOST_LINES))


def columns_of(rows: Sequence[Mapping[str, object]]) -> list[Column]:
    """The columns of rows that all have the names of the first."""
    return [
        Column(
            printable(name.replace("_", " ")),
            [cell(row[name]) for row in rows],
            all(isinstance(row[name], (int, float)) for row in rows),
        )
        for name in rows[0]
    ]


def widths_of(columns: Sequence[Column], room: int) -> list[int] | None:
    """Widths at which no word breaks; None where the room is too small for that.

    Headers fold first: that costs one line, and a folded cell costs one in its row.
    """
    room -= GAP * (len(columns) - 1)
    widths = [max(column.cell_width, cell_len(column.name)) for column in columns]
    for least in ([c.cell_width for c in columns], [c.least_width for c in columns]):
        while sum(widths) > room:
            spare = [i for i, width in enumerate(widths) if width > least[i]]
            if not spare:
                break
            widths[max(spare, key=lambda i: widths[i])] -= 1
    return widths if sum(widths) <= room else None


def fitted(
    columns: Sequence[Column], room: int, optional: Sequence[str]
) -> tuple[list[list[Column]], list[str]]:
    """Columns side by side in tables that fit, and the names of those that are left out.

    Optional columns go before a cell folds. What is still too wide when cells fold goes on in a
    table below, which repeats the columns up to the first one with a name.
    """
    kept, left_out = list(columns), []
    for name in optional:
        needed = sum(column.cell_width + GAP for column in kept) - GAP
        if needed > room and name in (column.name for column in kept):
            kept = [column for column in kept if column.name != name]
            left_out.append(name)
    keys = next((i for i, column in enumerate(kept) if column.name), 0) + 1
    tables = [kept[:keys]]
    for column in kept[keys:]:
        if len(tables[-1]) > keys and widths_of([*tables[-1], column], room) is None:
            tables.append(kept[:keys])
        tables[-1].append(column)
    return tables, left_out


def _show_table(listing: Listing) -> None:
    columns, room = columns_of(listing.rows), room_for_lines()
    if room is None:
        _print(_made(columns, None), in_a_file=IN_A_FILE)
        return
    tables, left_out = fitted(columns, room, listing.optional)
    for i, table in enumerate(tables):
        if i:
            say("")
        _print(_made(table, widths_of(table, room)), in_a_file=IN_A_FILE)
    if left_out:
        left = ", ".join(left_out)
        say(folded(f"(No room here for: {left}; a wider terminal or --json has them.)"))


def _made(columns: Sequence[Column], widths: list[int] | None) -> Table:
    """A plain table; every cell is text, whatever it holds."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        made.add_column(
            Text(column.name),
            justify="right" if column.is_number else "left",
            width=None if widths is None else widths[i],
        )
    for cells in zip(*(column.cells for column in columns), strict=True):
        made.add_row(*map(Text, cells))
    return made


def _print(made: Table, *, in_a_file: int) -> None:
    console = Console(file=sys.stdout, highlight=False)
    if room_for_lines() is None:
        console.width = max(console.width, in_a_file)
    console.print(made)


def room_for_lines() -> int | None:
    """Columns of the terminal, or those that COLUMNS asks for; None in a file or a pipe."""
    asked = os.environ.get("COLUMNS", "")
    told = asked.isdecimal() and int(asked) > 0
    if not told and not (sys.stdout is not None and sys.stdout.isatty()):
        return None
    return max(LEAST_ROOM, Console(file=sys.stdout).width)


def folded(text: str) -> str:
    """A paragraph with no word over the terminal's edge; in a file or a pipe as it is."""
    room = room_for_lines()
    if room is None:
        return text
    return "\n".join(
        textwrap.fill(line, room, break_long_words=False, break_on_hyphens=False)
        for line in text.split("\n")
    )


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)
