"""The emergence profile, the massive token by layer, and the picture of a check."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from melens.figures.draw import (
    LAYER_LABEL,
    ME_COLOUR,
    PAGE,
    Into,
    figure,
    mark_me_layer,
    plain,
    sheet,
)
from melens.results import CheckReport
from melens.results.describe import TokenPortrait
from melens.results.locate import MELayer

BESIDE_LEGEND = 30
"""Characters of a title that fit beside the legend; a longer one gets a line of its own."""
LONGEST_NAME = 60


@figure(MELayer, "profile")
def draw_profile(result: MELayer, into: Into = None) -> Figure:
    """Two panels over layers (0-based, block outputs): |x| on a log scale, and write shares."""
    made = sheet(into, PAGE, 3.6)
    top, bottom = made.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    _magnitudes(top, result)
    _shares(bottom, result)
    bottom.set_xlabel(LAYER_LABEL)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    made.align_ylabels()
    return made


def _magnitudes(axes: Axes, result: MELayer) -> None:
    layers = [row.layer for row in result.profile]
    axes.semilogy(layers, [row.max for row in result.profile], marker="o", label="largest |x|")
    axes.semilogy(
        layers,
        [row.token_median for row in result.profile],
        ls="--",
        label="median |x| of that token",
    )
    axes.semilogy(
        layers, [row.median for row in result.profile], ls=":", label="median |x| of the layer"
    )
    axes.set_ylabel("|x| (residual units)")
    axes.set_title(_title(result), loc="left")
    axes.grid(visible=True, axis="y")
    mark_me_layer(axes, result.me_layer)
    axes.legend(loc="lower right", ncols=3, bbox_to_anchor=(1, 1), borderaxespad=0.2)


def _shares(axes: Axes, result: MELayer) -> None:
    axes.axhline(0, color="black", lw=0.6)
    axes.set_ylabel("write share")
    if result.verdict == "none":
        axes.text(0.5, 0.5, "no massive token", transform=axes.transAxes, ha="center", va="center")
        axes.set_yticks([])
        return
    layers = [row.layer for row in result.profile]
    shares = [row.write_share or 0.0 for row in result.profile]
    colours = ["#0072B2" if share >= 0 else ME_COLOUR for share in shares]
    axes.bar(layers, shares, color=colours)
    axes.set_ylim(min(-0.1, *shares) * 1.1, max(0.1, *shares) * 1.15)


def _title(result: MELayer) -> str:
    """The model and how its texts began; what does not fit beside the legend gets its own."""
    name, start = result.run.model, result.run.start
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME // 2]}…{name[-LONGEST_NAME // 2 :]}"
    said = f" ({start})" if start else ""
    title = f"{plain(name)}{said}: {result.verdict}"
    if len(title) <= BESIDE_LEGEND:
        return title
    return f"{plain(name)}: {result.verdict}\n{start or ''}"


@figure(TokenPortrait, "curves")
def draw_curves(result: TokenPortrait, into: Into = None) -> Figure:
    """Energy in the top coordinates, and cosines, over layers."""
    made = sheet(into, PAGE, 3.6)
    if result.energy_layers is None:
        return nothing(made, result)
    top, bottom = made.subplots(2, 1, sharex=True)
    layers = range(result.n_layers)
    for k, curve in result.energy_layers.items():
        top.plot(layers, gaps(curve), marker="o", label=f"top {k}")
    top.set_ylabel("share of energy")
    top.set_ylim(0, 1.03)
    top.set_title(_token_title(result), loc="left")
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
def draw_dimensions(result: TokenPortrait, into: Into = None) -> Figure:
    """|x| of the token over layers and its largest dimensions, as bars in space."""
    made = sheet(into, PAGE, 3.8)
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
    made.suptitle(_token_title(result), x=0.02, y=0.98, ha="left", fontsize=8)
    return made


def nothing(made: Figure, result: TokenPortrait) -> Figure:
    """A figure that says that there is no massive token."""
    made.text(0.5, 0.5, f"{plain(result.run.subject)}: no massive token", ha="center")
    return made


def gaps(curve: tuple[float | None, ...]) -> list[float]:
    """None becomes NaN: a gap in the line."""
    return [float("nan") if value is None else value for value in curve]


def _token_title(result: TokenPortrait) -> str:
    first = result.massive[0]
    return plain(f"{result.run.subject}: token {first.token!r} at position {first.position}")


@figure(CheckReport, "profile")
def draw_check(result: CheckReport, into: Into = None) -> Figure:
    """The located ME Layer's profile, drawn from what the report holds of it."""
    return draw_profile(result.located(), into)
