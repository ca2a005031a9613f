"""Text from outside made safe to show: nothing in it moves a cursor, hides or turns a line round.

Model files, tokenizers, policies and results are written by others. What they hold reaches a
terminal, a page or a log only through :func:`printable`.
"""

from __future__ import annotations

import reprlib
import unicodedata

Interval = tuple[float, float]
LAYOUT = "\n\t"
"""Controls that our own lines are made with; a table's cells hold none."""
_ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode's controls (C0, DEL and C1), format characters, lone surrogates, and the separators of
lines and paragraphs."""
_JOINERS = "\u200c\u200d\u180e"
"""Invisible, but part of the spelling of Persian, Hindi, Mongolian and of many emoji."""
_SIGNS = "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
"""Format characters by their category that have a shape of their own."""
_LATIN_END = "\u0300"


def printable(text: str, *, keep: str = "") -> str:
    r"""The text with ``\x1b``, ``\u202e`` and the like for every character that is no shape.

    Escaped are controls (C0, DEL, C1), marks of direction, zero-width and other format characters,
    separators of lines and paragraphs, lone surrogates and noncharacters. Letters of every script
    stay as they are, the joiners inside their words included. Doing it twice changes nothing.

    Args:    keep: control characters that may stay, such as line breaks and tabs.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c in keep or _is_shape(text, i) else ascii(c)[1:-1] for i, c in enumerate(text)
    )


def _is_shape(text: str, at: int) -> bool:
    c = text[at]
    if " " <= c < "\x7f" or c in _SIGNS:
        return True
    if c in _JOINERS:  # between two letters that are not Latin: anywhere else they only hide
        return 0 < at < len(text) - 1 and text[at - 1] >= _LATIN_END <= text[at + 1]
    if "\ufdd0" <= c <= "\ufdef" or ord(c) & 0xFFFE == 0xFFFE:
        return False
    return unicodedata.category(c) not in _ESCAPED


def clipped(text: str, longest: int = 120) -> str:
    """The beginning of a text that may be of any length, safe to show."""
    shown = printable(text[: longest + 1])
    return shown if len(shown) <= longest else f"{shown[: longest - 3]}..."


class _Brief(reprlib.Repr):
    """A repr that stops early: nested, long and huge values are cut before they are written out."""

    def __init__(self, longest: int):
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = self.maxlong = longest
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 6

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 256:  # Python refuses to write the largest, and takes long over large
            return f"a whole number of {x.bit_length():,} bits"
        return super().repr_int(x, level)


def brief(value: object, longest: int = 60) -> str:
    """``repr`` of a value from outside for a message: at most ``longest`` characters, safe to show.

    A nested value is cut before it is expanded, so that a few bytes cannot become gigabytes.
    """
    text = printable(_Brief(longest).repr(value))
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def counted(n: int, what: str, *, none: str = "0") -> str:
    """A number of things, in words; ``none`` is written for 0."""
    return f"{n or none} {what}{'s' * (n != 1)}"


def interval_text(interval: Interval | None, spec: str, *, none: str = "-") -> str:
    """An interval in words; ``none`` where there is none."""
    return none if interval is None else f"{interval[0]:{spec}} to {interval[1]:{spec}}"


def within(interval: Interval | None, spec: str) -> str:
    """An interval in brackets, to follow its number; nothing where there is none."""
    return "" if interval is None else f" ({interval_text(interval, spec)})"


def with_interval(value: float, interval: Interval | None, spec: str) -> str:
    """A number and its interval in brackets, both in one format."""
    return f"{value:{spec}}{within(interval, spec)}"
