"""One generic registry: a duplicate raises, an unknown name says what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from melens.errors import DuplicateNameError, UnknownNameError
from melens.formatting import brief, clipped

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Named things of one kind, in the order they were registered."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T) -> T:
        """Register ``item``; a name that is taken raises DuplicateNameError."""
        if name in self._items:
            raise DuplicateNameError(f"{self.kind} '{name}' is registered already; choose another.")
        self._items[name] = item
        return item

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of :meth:`add`; the decorated object stays what it is."""
        return lambda item: self.add(name, item)

    def __getitem__(self, name: str) -> T:
        if isinstance(name, str) and name in self._items:
            return self._items[name]
        raise UnknownNameError(self.unknown(name))

    def unknown(self, name: object) -> str:
        """The message for a name that is not here, with the closest one that is."""
        return unknown_name(self.kind, name, self._items)

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a misspelt one means, if any is close."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The closest known name as a question, a blank before it; nothing where none is close."""
    close = closest(name, known)
    return "" if close is None else f" Did you mean '{close}'?"


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """The message for a name that is not known, with the closest one that is."""
    if not isinstance(name, str):
        return f"a {kind} is chosen by its name, got {brief(name)}. Known: {', '.join(known)}."
    name, known = clipped(name), list(known)
    return (
        f"unknown {kind} '{name}'.{did_you_mean(name, known)} Known: {', '.join(known) or 'none'}."
    )
