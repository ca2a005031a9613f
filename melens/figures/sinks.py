"""Attention sinks by layer and head, with and without an edit; attention of chosen heads."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from melens.errors import ResultError
from melens.figures.draw import (
    COLUMN,
    ME_COLOUR,
    PAGE,
    Into,
    figure,
    house_style,
    layer_axis,
    legend_below,
    mark_me_layer,
    panel,
    plain,
    sheet,
)
from melens.figures.profile import gaps
from melens.results.attention import AttentionMaps
from melens.results.sinks import Sinks


@figure(Sinks, "map")
def draw_map(result: Sinks, into: Into = None) -> Figure:
    """Attention to the first token, layers down, heads across; layers without attention blank."""
    alphas = _alphas(result)
    height = min(8.0, 1.1 + 0.11 * result.n_layers)
    made, axes = panel(into, COLUMN, height)
    image = axes.imshow(alphas, cmap="cividis", vmin=0, vmax=1, aspect="auto", origin="lower")
    axes.set_xlabel("head")
    axes.set_ylabel("layer (from 0)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if result.me_layer is not None:
        axes.axhline(result.me_layer + 0.5, color=ME_COLOUR, lw=1.0)
        axes.set_title(f"line: output of the ME Layer ({result.me_layer})", loc="left")
    made.colorbar(image, ax=axes, label=f"attention to the first token (T = {result.t})")
    if not isinstance(into, Axes):
        made.suptitle(plain(result.run.subject), fontsize=8)
    return made


@figure(Sinks, "curves")
def draw_curves(result: Sinks, into: Into = None) -> Figure:
    """Sink rates and mean attention to the first token by layer."""
    made, axes = panel(into, PAGE, 2.8)
    layers = range(result.n_layers)
    for eps, curve in result.sink_rate.items():
        axes.plot(layers, gaps(curve), marker="o", label=f"sink rate, eps {eps}")
    attention = gaps(result.attention_to_token)
    axes.plot(layers, attention, ls="--", color="black", label="mean attention")
    axes.axhline(result.uniform, ls=":", color="black", lw=0.8, label="uniform attention")
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("first token")
    layer_axis(axes)
    axes.set_title(plain(f"{result.run.subject}, T = {result.t}"), loc="left")
    legend_below(made, axes, into, columns=5)
    mark_me_layer(axes, result.me_layer)
    return made


Map = NDArray[np.float64]
"""[layer][head]; NaN where a layer has no attention."""


def draw_sink_change(before: Sinks, after: Sinks, *, edit: str = "with the edit") -> Figure:
    """Attention to the first token by layer and head: before, after, after - before.

    Args:    before, after: ``melens.sinks`` of one model on the same texts, the second measured
             inside the edit. edit: its name, for the middle map.
    Raises:  ResultError: of other weights, texts or T.
    """
    _check_same(before, after)
    maps = [_alphas(result) for result in (before, after)]
    apart = maps[1] - maps[0]
    with house_style():
        made = sheet(None, PAGE, min(6.0, 1.4 + 0.075 * before.n_layers))
        left, middle, right = made.subplots(1, 3, sharey=True)
        for axes, alphas, title in ((left, maps[0], "no edit"), (middle, maps[1], edit)):
            image: AxesImage = _show(axes, alphas, title, colours="cividis", low=0.0, high=1.0)
        made.colorbar(image, ax=(left, middle), label="attention to the first token", pad=0.02)
        most = float(np.nanmax(np.abs(apart), initial=0.0)) or 1e-3
        image = _show(right, apart, "difference", colours="PuOr", low=-most, high=most)
        made.colorbar(image, ax=right, label="change of attention", pad=0.04)
        left.set_ylabel("layer (from 0)")
        for axes in (left, middle, right):
            axes.set_xlabel("head")
            if before.me_layer is not None:
                axes.axhline(before.me_layer + 0.5, color=ME_COLOUR, lw=1.0)
        about = f"T = {before.t}, {before.sequences} texts"
        if before.me_layer is not None:
            about += f"; line: output of the ME Layer ({before.me_layer})"
        made.suptitle(plain(f"{before.run.subject}, {about}"), fontsize=8)
    return made


def _check_same(before: Sinks, after: Sinks) -> None:
    for what, one, other in (
        ("weights", before.run.weights, after.run.weights),
        ("texts", before.run.settings.get("ids"), after.run.settings.get("ids")),
        ("T", before.t, after.t),
    ):
        if one != other:
            raise ResultError(f"sinks of other {what} ({one} and {other}) cannot be compared.")


def _alphas(result: Sinks) -> Map:
    return np.array(result.grids()["alpha"], dtype=float)


def _show(
    axes: Axes, values: Map, title: str, *, colours: str, low: float, high: float
) -> AxesImage:
    axes.set_title(plain(title), loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto", origin="lower")


COLUMNS = 4
MAX_PANELS = 24
GAMMA = 0.4
"""Colours go with attention to this power, so that small weights show."""


@figure(AttentionMaps, "panels")
def draw_panels(result: AttentionMaps, into: Into = None) -> Figure:
    """Queries down, keys across; massive tokens' columns are ticked; the first MAX_PANELS heads.

    A learned sink's share of each row is a column of its own, left of the keys.
    """
    shown = result.heads[:MAX_PANELS]
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    wide = columns * (PAGE / COLUMNS if columns > 1 else 0.36 * PAGE)  # a single one larger
    beside = PAGE / COLUMNS * (columns < COLUMNS)  # for the bar of colours
    size = (wide + beside * 0.6, 0.6 + rows * 0.98 * wide / columns)
    made = sheet(into, *size)
    grid = made.subplots(rows, columns, squeeze=False)
    n = len(result.tokens)
    image = None
    for axes, head in zip(grid.flat, shown, strict=False):
        square = [[*row, *([math.nan] * (n - len(row)))] for row in head.rows]
        if head.learned:  # a column of its own, one apart from the first key's
            square = [[own, math.nan, *row] for own, row in zip(head.learned, square, strict=True)]
        left = -0.5 - 2 * bool(head.learned)
        image = axes.imshow(
            square,
            cmap="cividis",
            norm=PowerNorm(GAMMA, vmin=0, vmax=1),
            extent=(left, n - 0.5, n - 0.5, -0.5),
        )
        axes.set_title(f"layer {head.layer}, head {head.head}", loc="left")
        axes.set_xticks(
            [*([-2] if head.learned else []), *result.massive_positions],
            [*(["learned"] if head.learned else []), *map(str, result.massive_positions)],
        )
        axes.set_yticks([0, n - 1])
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    assert image is not None
    made.colorbar(image, ax=grid, label=f"attention (colour ~ its power {GAMMA})", shrink=0.8)
    part = f", {len(shown)} of {len(result.heads)} heads" if len(shown) < len(result.heads) else ""
    between = " " if columns > 2 else "\n"
    title = f"{result.run.subject}:{between}queries down, keys across (from 0){part}"
    made.suptitle(plain(title), fontsize=8)
    return made
