"""Tables as data: what a command shows of a result, before anything is printed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from melens.formatting import printable
from melens.registry import Registry

if TYPE_CHECKING:
    from melens.results.base import Result


class Listing(NamedTuple):
    """A caption and the table below it; without rows a paragraph, without a caption a table."""

    caption: str
    rows: Sequence[Mapping[str, object]] = ()
    optional: tuple[str, ...] = ()
    """Columns that a narrow terminal leaves out before a cell folds, the first of them first."""


R = TypeVar("R", bound="Result")
TABLES: Registry[Callable[[Any], list[Listing]]] = Registry("table")
"""By kind of result."""


def table_of(
    kind: str,
) -> Callable[[Callable[[R], Iterator[Listing]]], Callable[[R], list[Listing]]]:
    """Register what yields the listings of a kind of result."""
    return lambda make: TABLES.add(kind, lambda result: list(make(result)))


def rest(shown: int, total: int, what: str) -> Iterator[Listing]:
    """That a table is cut, where it is."""
    if total > shown:
        yield Listing(f"{shown} of {total} {what}; the JSON has all.")


def cell(value: object) -> str:
    """A value as a table shows it: four digits, and a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return printable(str(value))
