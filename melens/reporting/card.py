"""update_card(): one section of a model's README, and not a byte outside it."""

from __future__ import annotations

import re
from pathlib import Path

from melens.errors import ResultError
from melens.reporting.writing import markdown_body
from melens.results.check import CheckReport
from melens.store import PAGE, read_limited, write_atomically

START = "<!-- melens check: start -->"
END = "<!-- melens check: end -->"
_LINE = rb"^[ \t]*%s[ \t]*\r?$"
_MARKER = {mark: re.compile(_LINE % re.escape(mark.encode()), re.M) for mark in (START, END)}


def update_card(readme: Path, report: CheckReport) -> None:
    """Put the check into a README between two markers; add them at the end if they are missing.

    Everything else stays byte for byte, the YAML head and the kind of line ends included. The
    second update with the same report changes nothing.

    Raises:  ResultError: no such file, not UTF-8, or markers that do not make one section.
             OutputError: a file that cannot be written.
    """
    old = _read(readme)
    new = _updated(old, _section(report), str(readme))
    if new == old:
        return
    write_atomically(readme, new)


def refuse_bad_card(readme: Path) -> None:
    """What :func:`update_card` would refuse, said before any work.

    Raises:  ResultError: as update_card.
    """
    _updated(_read(readme), "", str(readme))


def _read(readme: Path) -> bytes:
    try:
        raw = read_limited(readme, PAGE)
        raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ResultError(f"cannot read {readme}: it is not UTF-8 text.") from None
    except OSError as error:
        raise ResultError(
            f"cannot read {readme}: {error.strerror}; give the README.md of a model."
        ) from None
    return raw


def _section(report: CheckReport) -> str:
    return f"{START}\n## Massive activations\n\n{markdown_body(report, level=3)}{END}"


def _updated(old: bytes, section: str, name: str) -> bytes:
    """The file with the section in it, in the file's own line ends."""
    end = b"\r\n" if b"\r\n" in old else b"\n"
    made = section.encode().replace(b"\n", end)
    starts, ends = (list(_MARKER[mark].finditer(old)) for mark in (START, END))
    if not starts and not ends:
        if not old:
            return made + end
        gap = end if old.endswith(b"\n") else end + end
        return old + gap + made + end
    if len(starts) != 1 or len(ends) != 1 or starts[0].start() > ends[0].start():
        raise ResultError(
            f"{name} has {_lines(len(starts), START)} and {_lines(len(ends), END)}; "
            "it must have one of each, in this order, or none."
        )
    stop = ends[0].end()
    if old[stop - 1 : stop] == b"\r":
        stop -= 1
    return old[: starts[0].start()] + made + old[stop:]


def _lines(count: int, mark: str) -> str:
    return f"{count} {'line' if count == 1 else 'lines'} {mark!r}"
