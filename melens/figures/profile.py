"""The emergence profile: how large activations are at each layer, and who adds how much."""

from __future__ import annotations

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
from melens.results.locate import MELayer

BESIDE_LEGEND = 30
"""Characters of a title that fit beside the legend; a longer one gets a line of its own."""
LONGEST_NAME = 60


@figure(MELayer, "profile")
def draw_profile(result: MELayer) -> Figure:
    """Two panels over layers (0-based, block outputs): |x| on a log scale, and write shares."""
    made = Drawing(figsize=(PAGE, 3.6), layout="constrained")
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
    axes.semilogy(layers, [row.token_median for row in result.profile], ls="--",
                  label="median |x| of that token")  # fmt: skip
    axes.semilogy(layers, [row.median for row in result.profile], ls=":",
                  label="median |x| of the layer")  # fmt: skip
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
