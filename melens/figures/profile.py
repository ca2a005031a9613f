"""The emergence profile, the massive token by layer, and the picture of a check."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from melens.figures.draw import (
    ME_COLOUR,
    PAGE,
    Into,
    figure,
    layer_axis,
    mark_erase_layer,
    mark_me_layer,
    named,
    panel,
    plain,
    sheet,
)
from melens.results import CheckReport
from melens.results.describe import TokenPortrait
from melens.results.locate import MELayer

LONGEST_NAME = 60
DECADES = 6
"""Of a heat map's colours; what is smaller has the darkest."""


@figure(MELayer, "profile")
def draw_profile(result: MELayer, into: Into = None) -> Figure:
    """Two panels over layers (0-based, block outputs): |x| on a log scale, and write shares."""
    made = sheet(into, PAGE, 3.6)
    top, bottom = made.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    _magnitudes(top, result)
    _shares(bottom, result)
    layer_axis(bottom)
    made.align_ylabels()
    made.legend(loc="outside lower center", ncols=3)
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
    mark_erase_layer(axes, result.erase_layer, at=0.16)  # clear of the other where both are near


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
    """The model, how its texts began, and the verdict."""
    said = f" ({result.run.start})" if result.run.start else ""
    return f"{named(result.run.model, LONGEST_NAME)}{said}: {result.verdict}"


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
    made.suptitle(_token_title(result), fontsize=8)
    top.legend(loc="lower right", ncols=4, bbox_to_anchor=(1, 1), borderaxespad=0.2)
    mark_me_layer(top, result.me_layer)
    _cosines(bottom, result)
    layer_axis(bottom)
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
    axes.legend(loc="lower right", ncols=3, bbox_to_anchor=(1, 1), borderaxespad=0.2)


@figure(TokenPortrait, "dimensions")
def draw_dimensions(result: TokenPortrait, into: Into = None) -> Figure:
    """|x| of the token on a log scale: layers across, its largest dimensions down."""
    shown = result.coordinates
    if not shown:
        return nothing(sheet(into, PAGE, 1.3), result)
    made, axes = panel(into, PAGE, 1.3 + 0.2 * len(shown))
    sizes = [[abs(value) for value in coordinate.values] for coordinate in shown]
    top = max(map(max, sizes)) or 1.0
    floor = min((x for row in sizes for x in row if x > 0), default=top / 10)
    floor = max(min(floor, top / 10), top / 10**DECADES)
    image = axes.imshow(
        [[max(value, floor) for value in row] for row in sizes],
        cmap="cividis",
        norm=LogNorm(floor, top),
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_yticks(range(len(shown)), [str(coordinate.dim) for coordinate in shown])
    axes.set_ylabel("dimension")
    layer_axis(axes)
    axes.set_title(_token_title(result), loc="left")
    if result.me_layer is not None:
        axes.axvline(result.me_layer - 0.5, color=ME_COLOUR, lw=1.2)
        axes.set_title(f"line: before the ME Layer ({result.me_layer})", loc="right", fontsize=7)
    made.colorbar(image, ax=axes, label="|x| (residual units)", pad=0.02)
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
