"""A figure promises what it draws: bars of a log axis, captions, names, scales; own style files."""

from __future__ import annotations

import json
from functools import cache

import matplotlib as mpl
import pytest
from matplotlib.colors import LogNorm
from planted_report import SAVED, maps

from melens.cli.app import main
from melens.comparing.differences import compare
from melens.comparing.sides import Side
from melens.errors import ResultError
from melens.figures import own_style, save_figure
from melens.figures.draw import PAGE, house_style
from melens.results import load_result


@cache
def saved(name: str):
    return load_result(SAVED / f"smollm2-135m-bos.{name}.json")


def texts(figure) -> str:
    """Every word of a figure."""
    return " ".join(part.get_text() for part in figure.findobj(mpl.text.Text))


@pytest.mark.parametrize("style", ["factorial", "neurons"])
def test_no_bar_stands_on_a_log_axis(style):
    made = saved("isolate").plot(style)
    scales = {axes.get_yscale() for axes in made.axes}
    assert scales & {"log", "symlog"}
    assert not any(axes.containers for axes in made.axes)
    if style == "neurons":
        (axes,) = made.axes
        points = axes.collections[0].get_offsets()[:, 1]
        assert len(points) == len(saved("isolate").neurons)
        assert axes.get_ylim()[0] < min(points) < 0 < max(points) < axes.get_ylim()[1]


@pytest.mark.parametrize("style", ["rank", "top1"])
def test_panels_of_one_quantity_have_one_scale(style):
    made, result = saved("collapse").plot(style), saved("collapse")
    panels = made.axes[: len(result.sites)]
    assert len({axes.get_ylim() for axes in panels}) == 1
    low, high = panels[0].get_ylim()
    heights = [y for axes in panels for line in axes.lines[:3] for y in line.get_ydata()]
    assert low == 0
    assert max(y for y in heights if y == y) < high


@pytest.mark.parametrize("name", ["perplexity-gamma.evaluate", "ifeval.evaluate"])
def test_no_two_labels_of_a_dose_figure_overlap(name):
    made = saved(name).plot()
    made.draw_without_rendering()
    curve, energy, beside = made.axes
    labels = [axes.yaxis.label.get_window_extent() for axes in (curve, energy)]
    labels += [name.get_window_extent() for name in beside.get_yticklabels()]
    for i, one in enumerate(labels):
        assert not any(one.overlaps(other) for other in labels[i + 1 :])


def test_bars_are_promised_only_where_there_are_any():
    without = saved("xstest.evaluate")
    assert all(c.delta is None or c.delta.interval is None for c in without.conditions)
    made = without.plot()
    assert "bars" not in texts(made)
    assert "no interval" in texts(made)
    assert [axes.get_ylim() for axes in made.axes[:1]] == [(-0.05, 0.05)]  # and no 1e-17
    assert "bars: 95 % over items" in texts(saved("perplexity-gamma.evaluate").plot())
    plain = saved("passkey.long-context")
    assert "95 % over texts" in texts(plain.plot("positions"))
    data = json.loads(plain.to_json())
    for condition in (data["base"], data["edited"], *data["controls"], *data["dose"]):
        for part in condition["bins"]:
            part["loss"]["interval"] = None
    bare = type(plain).from_json(json.dumps(data))
    assert "95 % over texts" not in texts(bare.plot("positions"))


def test_one_dose_is_no_curve():
    result = saved("perplexity-gamma.evaluate").model_copy(update={"dose": ()})
    (axes,) = result.plot().axes
    assert len(axes.get_yticks()) == 1 + len(result.controls) + len(result.rivals)


def test_a_single_head_leaves_no_empty_half():
    one, many = maps(layers=(12,), heads=1).plot(), maps().plot()
    assert one.get_figwidth() < 0.6 * PAGE < many.get_figwidth() == PAGE
    one.draw_without_rendering()
    panel = one.axes[0].get_window_extent()
    assert panel.width > 0.5 * one.bbox.width
    assert many.axes[0].get_window_extent().width < many.bbox.width / 4


def test_the_profile_marks_the_layer_that_erases():
    result = saved("locate")
    assert result.erase_layer is not None
    assert f"erase layer {result.erase_layer}" in texts(result.plot())
    kept = result.model_copy(update={"erase_layer": None})
    assert "erase" not in texts(kept.plot())


def test_dimensions_are_a_map_of_layers_on_a_log_scale():
    result = saved("describe")
    made = result.plot("dimensions")
    (image,) = made.axes[0].get_images()
    values = image.get_array()
    assert values.shape == (len(result.coordinates), result.n_layers)
    assert isinstance(image.norm, LogNorm)
    first = result.coordinates[0]
    assert values[0].tolist() == pytest.approx([abs(x) for x in first.values])
    names = [tick.get_text() for tick in made.axes[0].get_yticklabels()]
    assert names == [str(coordinate.dim) for coordinate in result.coordinates]


@pytest.mark.parametrize(
    ("name", "dtype", "a", "b"),
    [
        ("gemma3-270m", "float32", "A = smollm2-135m", "B = gemma3-270m"),
        ("smollm2-135m", "bfloat16", "A = smollm2-135m, float32", "B = smollm2-135m, bfloat16"),
        ("/a/long/path/" * 9 + "end", "float32", "A = smollm2-135m", "path/end"),
    ],
)
def test_both_sides_of_a_difference_have_their_names(name, dtype, a, b):
    other = saved("locate")
    run = other.run.model_copy(update={"model": name, "dtype": dtype})
    made = compare(*map(Side.of_result, (other, other.model_copy(update={"run": run})))).plot()
    said = texts(made)
    assert said.count(a) >= 2  # in the title and in the legend
    assert said.count(b) >= 2
    made.draw_without_rendering()
    (title,) = (t for t in made.findobj(mpl.text.Text) if "compared with" in t.get_text())
    assert title.get_window_extent().x1 < made.bbox.x1


def test_an_own_style_stands_above_ours_inside_the_block_only(tmp_path):
    path = tmp_path / "thesis.mplstyle"
    path.write_text('font.size: 11  # larger\naxes.facecolor: "#eeeeee"\n', "utf-8")
    plain = save_figure(saved("locate").plot(), tmp_path / "a.svg").read_bytes()
    with own_style(path), house_style():
        assert mpl.rcParams["font.size"] == 11
        assert mpl.rcParams["lines.linewidth"] == 1.2  # ours, where the file is silent
        drawn = saved("locate").plot()
        assert mpl.colors.to_hex(drawn.axes[0].get_facecolor()) == "#eeeeee"
    with own_style("ggplot"), house_style():
        assert mpl.rcParams["axes.facecolor"] == "#E5E5E5"
    again = save_figure(saved("locate").plot(), tmp_path / "b.svg").read_bytes()
    assert again == plain


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"font.size: 9\nfont size = 9\n", "line 2 is 'font size = 9'"),
        (b"# A title\n\nSome text: more\n", "line 3 is 'Some text: more'"),
        (b"font.size: large-ish\n", "not a style that matplotlib can read: .*font.size"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "as text; give a .mplstyle file"),
        (None, "there is no style '.*thesis.mplstyle'; give a .mplstyle file"),
    ],
)
def test_what_is_no_style_is_refused_in_one_line(tmp_path, content, says):
    path = tmp_path / "thesis.mplstyle"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ResultError, match=says) as caught, own_style(path):
        pass
    assert "\n" not in str(caught.value)


def test_plot_takes_a_style_file(tmp_path, capsys):
    style, out = tmp_path / "thesis.mplstyle", tmp_path / "profile.svg"
    style.write_text("axes.facecolor: eeeedd\n", "utf-8")
    result = str(SAVED / "smollm2-135m-bos.locate.json")
    for given, code in ((str(style), 0), (result, 2)):
        with pytest.raises(SystemExit) as done:
            main(["plot", result, "-o", str(out), "--mplstyle", given])
        assert (done.value.code or 0) == code
    assert "#eeeedd" in out.read_text("utf-8")
    said = capsys.readouterr().err
    assert "is not a matplotlib style: line 1 is '{'" in said
    assert said.count("\n") == 1
