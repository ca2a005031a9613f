"""Write tables_80.txt: the head of every kind's tables as a terminal of 80 columns shows them.

PYTHONPATH=. python tests/cli/make_snapshot.py
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

from melens.cli.render import show_listings
from melens.cli.tables import TABLES
from melens.comparing import diff
from melens.results import CheckReport, load_result
from melens.results.base import Result

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
SNAPSHOT = HERE / "tables_80.txt"
HEAD = 3
"""Rows of each table: how it is laid out, without all of its numbers."""
STYLE = re.compile(r"\x1b\[[0-9;]*m")


def results() -> Iterator[Result]:
    """One saved result of every kind, three of those inside a report included."""
    located = [DOCS / "results" / f"smollm2-135m{name}.locate.json" for name in ("", "-bos")]
    yield diff(*map(load_result, located), any_texts=True)
    saved = sorted([*DOCS.glob("results/*.json"), *HERE.glob("saved/*.json")], reverse=True)
    by_kind = {path.stem.rsplit(".", 1)[-1]: path for path in saved}  # the first of each
    yield from map(load_result, by_kind.values())
    report = load_result(DOCS / "reports" / "smollm2-135m.json")
    assert isinstance(report, CheckReport)
    yield report
    yield from map(report.result, ("attention", "cache_norms", "known"))  # saved nowhere else


def snapshot() -> str:
    """The text of the file."""
    parts: dict[str, str] = {}
    for result in results():
        if result.kind not in parts:
            parts[result.kind] = head_of(result)
    return "".join(f"=== {kind}\n{text}" for kind, text in sorted(parts.items()))


def head_of(result: Result) -> str:
    """Captions and the first rows of each table."""
    listings = [
        one._replace(rows=one.rows[:HEAD]) for one in TABLES[result.kind](result) if one.rows
    ]
    text = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "80"
    try:
        with redirect_stdout(text):
            show_listings(listings)
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    return "".join(f"{line.rstrip()}\n" for line in STYLE.sub("", text.getvalue()).splitlines())


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot(), "utf-8")
