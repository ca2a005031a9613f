"""Attention sinks without and with an edit: two maps, and where they differ."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from melens.errors import ResultError
from melens.figures.styles import ME_COLOUR, PAGE, Drawing, house_style, plain
from melens.results.sinks import Sinks

Map = list[list[float]]


def draw_sink_change(before: Sinks, after: Sinks, *, edit: str = "with the edit") -> Figure:
    """Attention to the first token by layer and head: before, after, after - before.

    Args:    before, after: ``melens.sinks`` of one model on the same texts, the second measured
             inside the edit. edit: its name, for the middle map.
    Raises:  ResultError: of other weights, texts or T.
    """
    _check_same(before, after)
    maps = [_alphas(result) for result in (before, after)]
    apart = [
        [b - a for a, b in zip(*rows, strict=True)] for rows in zip(maps[0], maps[1], strict=True)
    ]
    with house_style():
        made = Drawing(
            figsize=(PAGE, min(6.0, 1.4 + 0.075 * before.n_layers)), layout="constrained"
        )
        left, middle, right = made.subplots(1, 3, sharey=True)
        for axes, alphas, title in ((left, maps[0], "no edit"), (middle, maps[1], edit)):
            image: AxesImage = _show(axes, alphas, title, colours="cividis", low=0.0, high=1.0)
        made.colorbar(image, ax=(left, middle), label="attention to the first token", pad=0.02)
        most = max((abs(x) for row in apart for x in row if not math.isnan(x)), default=0) or 1e-3
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
    """[layer][head]; NaN where a layer has no attention."""
    heads = 1 + max(head.head for head in result.heads)
    made = [[math.nan] * heads for _ in range(result.n_layers)]
    for head in result.heads:
        made[head.layer][head.head] = head.alpha
    return made


def _show(
    axes: Axes, values: Map, title: str, *, colours: str, low: float, high: float
) -> AxesImage:
    axes.set_title(plain(title), loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto", origin="lower")
