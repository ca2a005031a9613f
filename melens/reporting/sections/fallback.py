"""Any result that has no section of its own: its sentence, its figure, its first rows."""

from __future__ import annotations

from melens.errors import ResultError
from melens.figures import FIGURES
from melens.reporting.sections.base import Block, Picture, Table, View
from melens.reporting.source import number_text

MOST_ROWS = 40


def other(view: View) -> Block:
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
