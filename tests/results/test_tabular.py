"""Tables and arrays of results: flat frames, CSV, LaTeX, numpy. Closed forms, then every kind."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from melens.errors import ResultError, UnknownNameError
from melens.results import load_result
from melens.results.tabular import arrays_of, csv_of, decimals_of, flat, frame_of, latex_of

DOCS = Path(__file__).parents[2] / "docs"
NAMES = ("locate", "describe", "collapse", "sinks", "isolate", "super-weights", "scan", "evaluate")
SAVED = [next(iter(sorted(DOCS.glob(f"results/*.{name}.json")))) for name in NAMES]
SAVED += [next(iter(sorted(DOCS.glob("results/*.long-context.json"))))]
SAVED += [next(iter(sorted(DOCS.glob("reports/*.json"))))]


@pytest.fixture(scope="module", params=SAVED, ids=lambda path: path.stem)
def result(request):
    return load_result(request.param)


def test_a_row_becomes_flat():
    row = {"layer": 3, "delta": {"value": 1.5, "interval": (1.0, 2.0)}, "interval": None}
    assert flat(row) == {
        "layer": 3,
        "delta.value": 1.5,
        "delta.interval_low": 1.0,
        "delta.interval_high": 2.0,
        "interval_low": None,
        "interval_high": None,
    }


@pytest.mark.parametrize(("width", "places"), [(0.2, 2), (0.02, 3), (2.0, 1), (20.0, 0), (2e4, 0)])
def test_two_digits_of_the_half_width(width, places):
    assert decimals_of(width) == places


def test_latex_by_hand():
    rows = [
        {"task_name": "50% & more", "loss": 1.23456, "interval": (1.13456, 1.33456), "n": 12345},
        {"task_name": "none", "loss": 1.2e-7, "interval": None, "n": 3},
    ]
    table = latex_of(frame_of(rows))
    assert r"task\_name & loss & interval\_low & interval\_high & n" in table
    assert r"50\% \& more & $1.23$ & $1.13$ & $1.33$ & $12{,}345$ \\" in table
    assert r"none & $1.2 \times 10^{-7}$ & -- & -- & $3$ \\" in table
    assert r"\begin{tabular}{lrrrr}" in table
    assert r"\toprule" in table


@pytest.mark.parametrize("count", [15, 0, 1])
def test_a_count_before_the_interval_of_its_share_stays(count):
    table = latex_of(frame_of([{"massive": count, "interval": (0.0, 0.2234)}]))
    assert rf"${count}$ & $0.00$ & $0.22$ \\" in table


def test_what_rounds_to_nothing_has_no_sign_and_no_width_does_not_round():
    rows = [{"delta": -0.0004, "interval": (-0.5, 0.5)}, {"delta": 0.25, "interval": (0.25, 0.25)}]
    table = latex_of(frame_of(rows))
    assert r"$0.00$ & $-0.50$ & $0.50$ \\" in table
    assert r"$0.25$ & $0.25$ & $0.25$ \\" in table


def test_whole_numbers_stay_whole_where_some_are_missing():
    frame = frame_of([{"layer": 2**60 + 1}, {"layer": None, "late": 2.5}])
    assert csv_of(frame) == "layer,late\n1152921504606846977,\n,2.5\n"
    assert r"--" in latex_of(frame)
    assert arrays_of({"t": [{"a": 1.0}, {"b": 2.0}]})["t.b"].tolist()[1] == 2.0


def test_csv_keeps_every_digit():
    rows = [{"a": 0.1 + 0.2, "dims": (1, 2), "said": 'a "word", and'}, {"a": None, "dims": None}]
    back = pd.read_csv(io.StringIO(csv_of(frame_of(rows))), float_precision="round_trip")
    assert back["a"][0] == 0.1 + 0.2
    assert back["dims"][0] == "[1, 2]"
    assert back["said"][0] == 'a "word", and'


def test_signs_of_latex_are_printed_as_they_are():
    table = latex_of(frame_of([{"token": "<|im_start|>~^\\{", "a|b": "x"}]))
    start = r"\textless{}\textbar{}im\_start\textbar{}\textgreater{}"
    assert start + r"\textasciitilde{}\textasciicircum{}\textbackslash{}\{ & x" in table
    assert r"token & a\textbar{}b \\" in table


def test_columns_are_chosen_and_an_interval_by_one_name():
    result = load_result(SAVED[NAMES.index("evaluate")])
    frame = result.to_frame(columns=["condition", "delta", "delta_interval"])
    assert list(frame) == ["condition", "delta", "delta_interval_low", "delta_interval_high"]
    assert r"condition & delta & delta\_interval\_low" in result.to_latex(columns=list(frame))
    with pytest.raises(UnknownNameError, match=r"unknown column 'detla'\. Did you mean 'delta'"):
        result.to_csv(columns=["detla"])


def test_every_kind_has_its_tables(result):
    tables = result.tables()
    assert next(iter(tables)) == "main"
    assert len(tables) > 1
    for name, rows in tables.items():
        assert len(result.to_frame(name)) == len(rows)
        assert len(pd.read_csv(io.StringIO(result.to_csv(table=name)))) == len(rows)
        assert result.to_latex(table=name).count(r"\\") == len(rows) + 1
    with pytest.raises(UnknownNameError, match=r"unknown table .mian.\. Did you mean .main."):
        result.to_frame("mian")


def test_an_interval_stands_behind_its_number(result):
    """What LaTeX rounds by: the number before ``_low`` lies between it and ``_high``."""
    for name in result.tables():
        frame = result.to_frame(name)
        for place, column in enumerate(frame.columns):
            if column.endswith("_low") and frame.columns[place - 1] != "massive":  # a count
                whole = frame.iloc[:, place - 1 : place + 2].dropna().astype(float)
                number, low, high = whole.to_numpy().T
                assert (low <= number).all(), (name, column)
                assert (number <= high).all(), (name, column)


def test_arrays_are_what_the_tables_hold(result):
    arrays = result.arrays()
    for name, rows in result.tables().items():
        for column in rows[0]:
            if isinstance(rows[0][column], float):
                held = [np.nan if row.get(column) is None else row[column] for row in rows]
                np.testing.assert_array_equal(arrays[f"{name}.{column}"], held)
            if isinstance(rows[0][column], str):
                held = [row.get(column) or "" for row in rows]
                assert arrays[f"{name}.{column}"].tolist() == held
    assert all(array.dtype.kind in "fU" and array.size for array in arrays.values())


def test_grids_have_the_shapes_of_their_figures():
    by_kind = {name: load_result(path) for name, path in zip(NAMES, SAVED, strict=False)}
    sinks, collapse = by_kind["sinks"], by_kind["collapse"]
    arrays = sinks.arrays()
    assert arrays["alpha"].shape == (sinks.n_layers, 4)
    head = sinks.heads[5]
    assert arrays["alpha"][head.layer, head.head] == head.alpha
    assert arrays["sink_rate.0.3"].shape == (sinks.n_layers,)
    kept, left = collapse.curve("k")
    np.testing.assert_array_equal(
        collapse.arrays()["effective_rank.k.with_token"], np.array(kept, dtype=float)
    )
    np.testing.assert_array_equal(
        collapse.arrays()["effective_rank.k.without_token"], np.array(left, dtype=float)
    )
    long = load_result(SAVED[-2])
    shape = (len(long.conditions), len(long.lengths), len(long.depths))
    assert long.arrays()["loss"].shape == shape
    assert long.arrays()["loss"][0, 1, 2] == long.base.cell(long.lengths[1], long.depths[2]).loss


def test_a_result_is_saved_and_read_again(tmp_path):
    result = load_result(SAVED[0])
    assert load_result(result.save(tmp_path / "mine.json")) == result
    assert result.save(tmp_path) == tmp_path / "locate.json"
    csv = result.to_csv(path=tmp_path / "profile.csv")
    assert csv == (tmp_path / "profile.csv").read_text("utf-8")
    latex = result.to_latex("massive", path=tmp_path / "massive.tex")
    assert latex == (tmp_path / "massive.tex").read_text("utf-8")


@pytest.mark.parametrize("path", ["", None, "figure.pdf", "table.csv"])
def test_where_no_json_can_go_is_refused(path):
    with pytest.raises(ResultError, match=r"\.json"):
        load_result(SAVED[0]).save(path)
