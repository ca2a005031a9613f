"""The weights-only scan and what it predicts; how far chosen first tokens really go."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from melens.figures.draw import (
    ERASE_COLOUR,
    ME_COLOUR,
    PAGE,
    Into,
    figure,
    layer_axis,
    plain,
    shared_legend,
    sheet,
)
from melens.results.reach import Reach
from melens.results.scan import WeightScan

MUTED = "#999999"
MARKS = {"emerge": "^", "erase": "v", "other": "o"}


@figure(WeightScan, "ceilings")
def draw_ceilings(result: WeightScan, into: Into = None) -> Figure:
    """Left: ceiling of each layer's highest neuron and of its median one. Right: their ratio."""
    made = sheet(into, PAGE, 3.1)
    ceilings, ratios = made.subplots(1, 2)
    _ceilings(ceilings, result)
    _ratios(ratios, result)
    handles, names = ceilings.get_legend_handles_labels()
    if handles:
        made.legend(handles, names, loc="outside lower center", ncols=4)
    made.suptitle(plain(f"{result.run.subject}: what single FFN neurons could write"), fontsize=8)
    return made


def _ceilings(axes: Axes, result: WeightScan) -> None:
    if any(row.whole is not None for row in result.profile):
        axes.plot(*_line(result, "whole"), color="black", ls=":", label="bound of the whole FFN")
    axes.plot(*_line(result, "ceiling"), color=MUTED, label="highest neuron")
    axes.plot(*_line(result, "median"), color=MUTED, ls="--", label="median neuron")
    _points(axes, result, "ceiling")
    axes.set_ylabel("ceiling (residual units)")
    _frame(axes, result)


def _ratios(axes: Axes, result: WeightScan) -> None:
    axes.plot(*_line(result, "ratio_to_median"), color=MUTED)
    _points(axes, result, "ratio_to_median")
    axes.set_ylabel("highest / median neuron")
    _frame(axes, result)


def _line(result: WeightScan, field: str) -> tuple[list[int], list[float]]:
    """A field by layer; layers without it are left out."""
    found = [(row.layer, getattr(row, field)) for row in result.profile]
    found = [(layer, value) for layer, value in found if value is not None]
    return [layer for layer, _ in found], [value for _, value in found]


def _points(axes: Axes, result: WeightScan, value: str) -> None:
    """Candidates, coloured by their dimension; up = it makes, down = it erases."""
    colours = {dim: f"C{i}" for i, dim in enumerate(result.dims)}
    named: set[int] = set()
    for found in result.candidates:
        colour = colours.get(found.dim, MUTED)
        label = f"dim {found.dim}" if found.dim in colours and found.dim not in named else None
        named.add(found.dim)
        axes.plot(
            found.layer,
            getattr(found, value),
            marker=MARKS[found.role],
            color=colour,
            ls="",
            ms=5 if found.dim in colours else 3,
            label=label,
        )


def _frame(axes: Axes, result: WeightScan) -> None:
    if any(row.covered and row.ceiling for row in result.profile):
        axes.set_yscale("log")
    layer_axis(axes)
    axes.set_xlim(-0.5, result.n_layers - 0.5)
    marks = (
        (result.me_layer, ME_COLOUR, "predicted ME Layer", 0.93),
        (result.erase_layer, ERASE_COLOUR, "predicted erasure", 0.03),
    )
    for layer, colour, text, height in marks:
        if layer is None:
            continue
        axes.axvline(layer, color=colour, lw=0.8)
        late = layer > result.n_layers / 2
        axes.annotate(
            f"{text} {layer}",
            (layer, height),
            xytext=(-4 if late else 4, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            color=colour,
            fontsize=7,
            ha="right" if late else "left",
        )


COLOURS = {"bos": ME_COLOUR, "chat": "#0072B2", "given": "#009E73", "sample": "#999999"}
NAMES = {
    "bos": "BOS",
    "chat": "first of a chat",
    "given": "asked for",
    "sample": "drawn at random",
}


@figure(Reach, "reach")
def draw_reach(result: Reach, into: Into = None) -> Figure:
    """Left: the residual's largest |x|, one line a token. Right: the largest FFN write."""
    made = sheet(into, PAGE, 3.0)
    tokens, writes = made.subplots(1, 2)
    _tokens(tokens, result)
    _writes(writes, result)
    shared_legend(made, tokens, writes, columns=4)
    made.suptitle(plain(f"{result.run.subject}: {len(result.tokens)} first tokens"), fontsize=8)
    return made


def _tokens(axes: Axes, result: Reach) -> None:
    seen: set[str] = set()
    layers = range(result.until + 1)
    for token in reversed(result.tokens):  # the named ones on top
        label = None if token.why in seen else NAMES[token.why]
        seen.add(token.why)
        drawn = token.why == "sample"
        axes.plot(
            layers, token.largest, color=COLOURS[token.why], lw=0.6 if drawn else 1.3, label=label
        )
    _finish(axes, "largest |x| at the block output")


def _writes(axes: Axes, result: Reach) -> None:
    rows = [row for row in result.profile if row.write]
    axes.plot(
        [row.layer for row in rows],
        [abs(row.write or 0) for row in rows],
        color="black",
        marker="o",
        ms=2.5,
        label="largest |FFN write|",
    )
    bound = [(row.layer, row.ceiling) for row in result.profile if row.ceiling]
    if bound:
        axes.plot(
            [layer for layer, _ in bound],
            [ceiling for _, ceiling in bound],
            color="black",
            ls="--",
            lw=0.8,
            label="ceiling of one neuron (scan)",
        )
    _finish(axes, "|x| added by the FFN")


def _finish(axes: Axes, label: str) -> None:
    axes.set_yscale("log")
    axes.set_ylabel(label)
    layer_axis(axes, "layer (counted from 0)")
