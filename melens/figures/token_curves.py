"""The massive token by layer: energy, cosines, and the layer x dimension view."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from melens.figures.styles import (
    LAYER_LABEL,
    ME_COLOUR,
    PAGE,
    Drawing,
    figure,
    mark_me_layer,
    plain,
)
from melens.results.describe import TokenPortrait


@figure(TokenPortrait, "curves")
def draw_curves(result: TokenPortrait) -> Figure:
    """Energy in the top coordinates, and cosines, over layers."""
    made = Drawing(figsize=(PAGE, 3.6), layout="constrained")
    if result.energy_layers is None:
        return nothing(made, result)
    top, bottom = made.subplots(2, 1, sharex=True)
    layers = range(result.n_layers)
    for k, curve in result.energy_layers.items():
        top.plot(layers, gaps(curve), marker="o", label=f"top {k}")
    top.set_ylabel("share of energy")
    top.set_ylim(0, 1.03)
    top.set_title(_title(result), loc="left")
    top.legend(loc="lower right", ncols=4, bbox_to_anchor=(1, 1), borderaxespad=0.2)
    mark_me_layer(top, result.me_layer)
    _cosines(bottom, result)
    bottom.set_xlabel(LAYER_LABEL)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    made.align_ylabels()
    return made


def _cosines(axes: Axes, result: TokenPortrait) -> None:
    layers = range(result.n_layers)
    resid = next(site for site in result.sites if site.site == "resid_post")
    axes.plot(layers, gaps(result.cosine_layers), marker="o", label="with the peak")
    axes.plot(layers, gaps(resid.consecutive), ls="--", label="with the layer before")
    if result.inputs > 1:
        label = f"between {result.inputs} inputs"
        axes.plot(layers, gaps(result.cosine_inputs), ls=":", label=label)
    axes.axvline(result.me_layer or 0, color=ME_COLOUR, lw=0.8)
    axes.set_ylabel("cosine")
    axes.set_ylim(top=1.03)
    axes.legend(loc="lower right", ncols=3)


@figure(TokenPortrait, "dimensions")
def draw_dimensions(result: TokenPortrait) -> Figure:
    """|x| of the token over layers and its largest dimensions, as bars in space."""
    made = Drawing(figsize=(PAGE, 3.8))
    if not result.coordinates:
        return nothing(made, result)
    axes: Any = made.add_axes((0.0, 0.0, 0.98, 0.98), projection="3d")
    shown = result.coordinates
    colours = mpl.colormaps["cividis"]
    for place, coordinate in enumerate(shown):
        heights = [abs(value) for value in coordinate.values]
        colour = colours(1 - place / max(len(shown) - 1, 1))
        axes.bar(range(len(heights)), heights, zs=place, zdir="y", color=colour, width=0.8)
    axes.set_yticks(range(len(shown)), [str(coordinate.dim) for coordinate in shown])
    axes.tick_params(axis="z", pad=5)
    axes.set_xlabel("layer (from 0)")
    axes.set_ylabel("dimension")
    axes.set_zlabel("|x| (residual units)", labelpad=8)
    axes.set_box_aspect((2.2, 1.4, 1), zoom=1.0)
    axes.view_init(elev=24, azim=-62)
    made.suptitle(_title(result), x=0.02, y=0.98, ha="left", fontsize=8)
    return made


def nothing(made: Figure, result: TokenPortrait) -> Figure:
    """A figure that says that there is no massive token."""
    made.text(0.5, 0.5, f"{plain(result.run.subject)}: no massive token", ha="center")
    return made


def gaps(curve: tuple[float | None, ...]) -> list[float]:
    """None becomes NaN: a gap in the line."""
    return [float("nan") if value is None else value for value in curve]


def _title(result: TokenPortrait) -> str:
    first = result.massive[0]
    return plain(f"{result.run.subject}: token {first.token!r} at position {first.position}")
