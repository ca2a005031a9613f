"""Tables as a terminal of any width shows them: no word broken, nothing gone in silence."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.cells import cell_len

from melens.cli.listing import Listing
from melens.cli.render import columns_of, fitted, show_listings, widths_of
from melens.cli.tables import TABLES
from melens.results import load_result

DOCS = Path(__file__).parents[2] / "docs"
SAVED = {path.stem.rsplit(".", 1)[-1]: path for path in sorted(DOCS.glob("results/*.json"))}
"""The last file of each kind."""
BOLD = re.compile(r"\x1b\[[0-9;]*m")
ROWS = [
    {"layer": i, "first value": 1234.5 * i, "note": "an ordinary layer", "loss": 0.25 / (i + 1)}
    for i in range(3)
]


@pytest.fixture
def on_a_terminal(monkeypatch, capsys):
    """Listings as a terminal of so many columns gets them."""

    def show(listings, columns):
        with monkeypatch.context() as patched:
            patched.setenv("COLUMNS", str(columns))
            patched.setenv("TERM", "xterm")
            patched.setattr(sys.stdout, "isatty", lambda: True)
            show_listings(listings)
        return BOLD.sub("", capsys.readouterr().out).splitlines()

    return show


def _words(listings):
    for one in listings:
        for row in one.rows:
            for column in columns_of([row]):
                yield from column.name.split()
                yield from column.cells[0].split()


def test_tables_at_80_columns_are_as_frozen():
    """Changed on purpose: python tests/cli/make_snapshot.py, and look at the difference."""
    from make_snapshot import SNAPSHOT, snapshot

    made = snapshot()
    assert made.splitlines() == SNAPSHOT.read_text("utf-8").splitlines()
    assert max(map(cell_len, made.splitlines())) <= 80
    kinds = set(re.findall(r"^=== (.*)$", made, re.M))
    assert set(TABLES) - kinds == {"edit", "finetune", "tune"}  # tables like others', no saved one


@cache
def _saved(path):
    return load_result(path)


@pytest.mark.parametrize("columns", [60, 80])
def test_saved_results_fit_and_no_word_breaks(on_a_terminal, columns):
    kinds = set()
    for path in SAVED.values():
        result = _saved(path)
        made = TABLES[result.kind](result)
        assert all(set(one.optional) <= set(one.rows[0]) for one in made if one.rows)
        tables = [Listing("", one.rows) for one in made if one.rows]
        lines = on_a_terminal(tables, columns)
        assert max(map(cell_len, lines)) <= columns, path
        shown = {word for line in lines for word in line.split()}
        assert set(_words(tables)) <= shown, path
        kinds.add(result.kind)
    assert len(kinds) >= 9


def test_headers_fold_before_cells_do():
    columns = columns_of(ROWS)
    assert widths_of(columns, 100) == [5, 11, 17, 7]
    assert widths_of(columns, 40) == [5, 5, 17, 7]
    assert widths_of(columns, 39) == [5, 5, 16, 7]
    assert widths_of(columns, 31) == [5, 5, 8, 7]
    assert widths_of(columns, 30) is None


def test_what_is_left_out_is_said(on_a_terminal):
    listing = Listing("Layers:", ROWS, optional=("note", "loss"))
    lines = on_a_terminal([listing], 39)
    assert lines[0] == "Layers:"
    told = " ".join(lines[-2:])  # folded, as the caption is
    assert told == "(No room here for: note; a wider terminal or --json has them.)"
    assert "ordinary" not in " ".join(lines)
    assert "No room" not in " ".join(on_a_terminal([listing], 40))
    assert fitted(columns_of(ROWS), 12, listing.optional)[1] == ["note", "loss"]
    assert fitted(columns_of(ROWS), 40, listing.optional)[1] == []  # the header folds instead


def test_what_is_too_wide_goes_on_below_with_its_first_column(on_a_terminal):
    lines = [line.rstrip() for line in on_a_terminal([Listing("", ROWS)], 21)]
    assert lines == [
        "layer  first value",
        "    0            0",
        "    1        1,234",
        "    2        2,469",
        "",
        "layer  note",
        "    0  an ordinary",
        "       layer",
        "    1  an ordinary",
        "       layer",
        "    2  an ordinary",
        "       layer",
        "",
        "layer     loss",
        "    0     0.25",
        "    1    0.125",
        "    2  0.08333",
    ]


def test_a_sign_without_a_header_is_no_name_of_a_row():
    rows = [{"": "-", "what": "rank", **{f"long header {i}": "a" * 14 for i in range(4)}}]
    tables, _ = fitted(columns_of(rows), 40, ())
    assert len(tables) > 1
    assert all([column.name for column in table[:2]] == ["", "what"] for table in tables)


def test_a_file_gets_wide_tables_whatever_the_terminal(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    caption = "a word " * 40
    show_listings([Listing(caption, ROWS), Listing("")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == caption
    assert lines[1].split() == ["layer", "first", "value", "note", "loss"]
    assert len(lines) == 6
    assert lines[-1] == ""


def test_columns_are_kept_in_a_pipe_too(monkeypatch, capsys, on_a_terminal):
    listings = [Listing("a word " * 20, ROWS)]
    monkeypatch.setenv("COLUMNS", "30")
    show_listings(listings)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 30
    assert lines == on_a_terminal(listings, 30)
    for nothing in ("", "wide"):
        monkeypatch.setenv("COLUMNS", nothing)
        show_listings(listings)
        assert "a word " * 20 in capsys.readouterr().out


def test_a_table_of_massive_tokens_says_that_it_is_cut():
    """At most 8 of N rows are shown."""
    from melens.cli.tables import measures

    tokens = [
        SimpleNamespace(position=i, token="a", dim=i, value=1.0, frequency=1.0) for i in range(9)
    ]
    *_, last = measures._massive(SimpleNamespace(massive=tokens), "")
    assert "8 of 9 massive tokens and dimensions; the JSON has all." in str(last)
    assert len([*measures._massive(SimpleNamespace(massive=tokens[:8]), "")]) == 1
