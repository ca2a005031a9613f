"""Figures into the user's axes and figures; several models in one."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from planted_report import SAVED

from melens.errors import ResultError
from melens.figures import FIGURES, compare
from melens.figures.draw import rendered
from melens.results import load_result

ONE_PANEL = {
    "isolate": {"path", "neurons", "gains"},
    "sinks": {"map", "curves"},
    "evaluate": {"paired"},
    "describe": {"dimensions"},
}


def saved(name):
    return load_result(SAVED / f"{name}.json")


@pytest.mark.parametrize(
    "name",
    [
        "smollm2-135m-bos.locate",
        "smollm2-135m-bos.isolate",
        "smollm2-135m-bos.sinks",
        "smollm2-135m-bos.describe",
        "smollm2-135m-bos.collapse",
        "smollm2-135m-bos.perplexity-gamma.evaluate",
        "smollm2-135m-bos.passkey.long-context",
        "smollm2-135m.scan",
    ],
)
def test_a_style_is_drawn_where_the_user_wants_it(name):
    result = saved(name)
    for style in FIGURES[type(result)]:
        outer = Figure(figsize=(9, 5), layout="constrained")
        left, right = outer.subfigures(1, 2)
        assert result.plot(style, figure=left) is outer
        assert left.axes
        assert not right.axes
        ax = Figure().add_subplot()
        if style in ONE_PANEL.get(name.rpartition(".")[2], ()):
            assert result.plot(style, ax=ax) is ax
            assert ax.has_data()
        else:
            with pytest.raises(ResultError, match=r"several panels .* pass figure=.*compare"):
                result.plot(style, ax=ax)
            assert not ax.has_data()


def test_the_users_settings_stay_in_force():
    """In a figure of the user's the user's style counts; melens' own is for new figures."""
    sinks = saved("smollm2-135m-bos.sinks")
    with mpl.rc_context({"axes.spines.right": True, "lines.linewidth": 7.0}):
        mine = sinks.plot("curves", ax=Figure().add_subplot())
        own = sinks.plot("curves")
    assert mine.lines[0].get_linewidth() == 7.0
    assert own.axes[0].lines[0].get_linewidth() < 3
    again = sinks.plot("curves")
    assert rendered(own, "png", dpi=50) == rendered(again, "png", dpi=50)


def test_what_is_no_place_to_draw_is_refused():
    sinks = saved("smollm2-135m-bos.sinks")
    figure = Figure()
    with pytest.raises(ResultError, match="ax and figure exclude each other"):
        sinks.plot("curves", ax=figure.add_subplot(), figure=figure)
    with pytest.raises(ResultError, match="ax must be matplotlib Axes, got 3"):
        sinks.plot("curves", ax=3)
    with pytest.raises(ResultError, match=r"holds 1 axes already; give an empty one, or clear"):
        sinks.plot("curves", figure=figure)


def test_a_plain_figure_gets_a_layout_in_which_legends_fit():
    figure = Figure()
    saved("smollm2-135m-bos.locate").plot(figure=figure)
    assert type(figure.get_layout_engine()).__name__ == "ConstrainedLayoutEngine"


def test_two_models_have_a_line_each():
    small, gemma = saved("smollm2-135m-bos.locate"), saved("gemma3-270m.locate")
    axes = compare([small, gemma]).axes[0]
    first, first_mark, second, _, _ = axes.lines
    assert [first.get_label(), second.get_label()] == ["smollm2-135m", "gemma3-270m"]
    np.testing.assert_array_equal(first.get_ydata(), [row.max for row in small.profile])
    assert first.get_xdata()[-1] == second.get_xdata()[-1] == 1.0  # other depths: shares
    assert first_mark.get_xdata()[0] == (small.me_layer + 1) / small.n_layers
    assert "share of the blocks" in axes.get_xlabel()


def test_equal_models_are_told_apart_and_stand_over_layers():
    bos, plain = saved("smollm2-135m-bos.locate"), saved("smollm2-135m.locate")
    axes = compare([bos, plain]).axes[0]
    names = [line.get_label() for line in axes.lines]
    assert "smollm2-135m (with BOS)" in names
    assert "smollm2-135m (without BOS)" in names
    assert "counted from 0" in axes.get_xlabel()
    twice = compare([bos, bos], names=["one", "$x_1$"], ax=Figure().add_subplot())
    assert [line.get_label() for line in twice.lines][:3:2] == ["one", r"\$x_1\$"]
    assert compare([bos], names=["_mine"]).axes[0].lines[0].get_label() == " _mine"
    assert "…" in compare(bos, names=["x" * 300]).axes[0].lines[0].get_label()


def test_without_the_massive_token_is_dashed():
    both = [saved("smollm2-135m-bos.collapse"), saved("gemma3-270m.collapse")]
    dashed = [line for line in compare(both).axes[0].lines if line.get_linestyle() == "--"]
    _, left = both[0].curve("k")
    np.testing.assert_array_equal(dashed[0].get_ydata(), np.array(left, dtype=float))


def test_evaluations_are_points_with_their_intervals():
    names = ("gsm8k-likelihood-gamma", "perplexity-gamma", "perplexity-activation")
    results = [saved(f"gemma3-270m.{name}.evaluate") for name in names]
    axes = compare(results).axes[0]
    intervals = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2][:3]
    np.testing.assert_array_equal(intervals, [result.delta.interval for result in results])
    assert "nats a token (lower is better)" in axes.get_xlabel()


def test_what_cannot_stand_in_one_figure_is_refused():
    locate, sinks = saved("smollm2-135m-bos.locate"), saved("smollm2-135m-bos.sinks")
    with pytest.raises(ResultError, match="compare got no results"):
        compare([])
    with pytest.raises(ResultError, match=r"got str; read saved ones with melens\.results\.load"):
        compare(["locate.json"])
    for names in ("ab", ["a"], ["a", ""], [1, 2]):
        with pytest.raises(ResultError, match="names must be a list of 2 texts"):
            compare([locate, locate], names=names)
    with pytest.raises(ResultError, match="got MELayer, Sinks"):
        compare([locate, sinks])
    isolation = saved("smollm2-135m-bos.isolate")
    with pytest.raises(ResultError, match="no figure compares Isolation; it can be of MELayer"):
        compare([isolation, isolation])
    of_units = [
        saved(f"smollm2-135m-bos.{name}.evaluate") for name in ("perplexity-gamma", "ifeval")
    ]
    with pytest.raises(ResultError, match=r"of 2 units or metrics \(.*draw each"):
        compare(of_units)


def test_a_model_without_a_massive_token_has_no_curve_and_changes_no_axis():
    token = saved("smollm2-135m-bos.describe")
    nothing = token.model_copy(update={"energy_layers": None, "me_layer": None})
    axes = compare([token, nothing], names=["one", "none"]).axes[0]
    assert "counted from 0" in axes.get_xlabel()
    assert axes.lines[0].get_xdata()[-1] == token.n_layers - 1
