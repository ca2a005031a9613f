"""One section of a model's README, and not a byte outside it: a check's, or a census's."""

from __future__ import annotations

import re
from pathlib import Path

from melens.errors import ResultError
from melens.formatting import printable
from melens.reporting.writing import markdown_body
from melens.results.census import Census, CensusRow
from melens.results.check import CheckReport
from melens.store import PAGE, read_limited, write_atomically

Marks = tuple[str, str]
"""The lines that a section begins and ends with."""
CHECK: Marks = ("<!-- melens check: start -->", "<!-- melens check: end -->")
CENSUS: Marks = ("<!-- melens census: start -->", "<!-- melens census: end -->")
_LINE = rb"^[ \t]*%s[ \t]*\r?$"
CELLS = ("model", "parameters", "ME Layer", "depth", "verdict", "largest", "published", "match")


def update_card(readme: Path, report: CheckReport) -> None:
    """Put the check into a README between two markers; add them at the end if they are missing.

    Everything else stays byte for byte, the YAML head and the kind of line ends included. The
    second update with the same report changes nothing.

    Raises:  ResultError: no such file, not UTF-8, or markers that do not make one section.
             OutputError: a file that cannot be written.
    """
    body = f"## Massive activations\n\n{markdown_body(report, level=3)}"
    _write(readme, CHECK, body)


def update_census_card(readme: Path, census: Census) -> None:
    """Put a census into a README, as :func:`update_card` does a check, in a section of its own.

    Raises:  as update_card.
    """
    rows = [_census_row(row) for row in census.models]
    lines = [CELLS, ("---",) * len(CELLS), *rows]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    said = printable(census.summary()).replace("<", "&lt;")
    _write(readme, CENSUS, f"## ME Layers\n\n{table}\n{said} (melens census)\n")


def _census_row(row: CensusRow) -> tuple[str, ...]:
    if row.error is not None:
        shown = (row.name, None, None, None, f"failed: {row.error}", None, None, None)
    else:
        layer = "none" if row.me_layer is None else row.me_layer
        shown = (
            row.name,
            None if row.parameters is None else f"{row.parameters:,}",
            f"{layer} of {row.n_layers}",
            None if row.depth is None else f"{row.depth:.2f}",
            row.verdict or row.how,
            None if row.largest is None else f"{row.largest:,.0f}",
            row.published,
            row.match,
        )
    return tuple("-" if cell is None else _cell(cell) for cell in shown)


def _cell(text: str) -> str:
    """No name breaks out of its cell, or is HTML."""
    plain = printable(" ".join(text.split()))
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _write(readme: Path, marks: Marks, body: str) -> None:
    old = _read(readme)
    new = _updated(old, f"{marks[0]}\n{body}{marks[1]}", str(readme), marks)
    if new != old:
        write_atomically(readme, new)


def refuse_bad_card(readme: Path, marks: Marks = CHECK) -> None:
    """What :func:`update_card` would refuse, said before any work.

    Raises:  ResultError: as update_card.
    """
    _updated(_read(readme), "", str(readme), marks)


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


def _updated(old: bytes, section: str, name: str, marks: Marks) -> bytes:
    """The file with the section in it, in the file's own line ends."""
    end = b"\r\n" if b"\r\n" in old else b"\n"
    made = section.encode().replace(b"\n", end)
    lines = (re.compile(_LINE % re.escape(mark.encode()), re.M) for mark in marks)
    starts, ends = (list(line.finditer(old)) for line in lines)
    if not starts and not ends:
        if not old:
            return made + end
        gap = end if old.endswith(b"\n") else end + end
        return old + gap + made + end
    if len(starts) != 1 or len(ends) != 1 or starts[0].start() > ends[0].start():
        raise ResultError(
            f"{name} has {_lines(len(starts), marks[0])} and {_lines(len(ends), marks[1])}; "
            "it must have one of each, in this order, or none."
        )
    stop = ends[0].end()
    if old[stop - 1 : stop] == b"\r":
        stop -= 1
    return old[: starts[0].start()] + made + old[stop:]


def _lines(count: int, mark: str) -> str:
    return f"{count} {'line' if count == 1 else 'lines'} {mark!r}"
