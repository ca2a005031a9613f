"""Rank collapse: how many directions are filled, with and without the massive token."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from melens.figures.draw import (
    ME_COLOUR,
    PAGE,
    Into,
    figure,
    panel,
    plain,
    sheet,
)
from melens.figures.profile import gaps
from melens.results.collapse import Collapse
from melens.results.metric import MetricProfile

NAMES = {
    "resid_post": "residual (block output)",
    "ln1": "attention input (after its norm)",
    "q": "queries",
    "k": "keys",
    "q_norm": "queries after QK-norm",
    "k_norm": "keys after QK-norm",
    "rot_q": "queries after RoPE",
    "rot_k": "keys after RoPE",
    "v": "values",
}
COLUMNS = 3


@figure(Collapse, "rank")
def draw_rank(result: Collapse, into: Into = None) -> Figure:
    """Effective rank by layer, a panel a site: with the token, without it, and centred."""
    return _panels(result, "effective_rank", "effective rank", into)


@figure(Collapse, "participation")
def draw_participation(result: Collapse, into: Into = None) -> Figure:
    """Participation ratio by layer, a panel a site."""
    return _panels(result, "participation_ratio", "participation ratio", into)


@figure(Collapse, "stable")
def draw_stable(result: Collapse, into: Into = None) -> Figure:
    """Stable rank by layer, a panel a site."""
    return _panels(result, "stable_rank", "stable rank", into)


@figure(Collapse, "entropy")
def draw_entropy(result: Collapse, into: Into = None) -> Figure:
    """Matrix entropy by layer, a panel a site."""
    return _panels(result, "matrix_entropy", "matrix entropy (nats)", into)


@figure(Collapse, "top1")
def draw_top1(result: Collapse, into: Into = None) -> Figure:
    """Share of energy in the top direction by layer, a panel a site."""
    return _panels(result, "top1_share", "top-1 share", into)


def _panels(result: Collapse, definition: str, label: str, into: Into) -> Figure:
    rows = -(-(len(result.sites) + 1) // COLUMNS)
    made = sheet(into, PAGE, 0.3 + 1.5 * rows)
    grid = made.subplots(rows, COLUMNS, squeeze=False, sharex=True, sharey=True)  # to be compared
    for axes, site in zip(grid.flat, result.sites, strict=False):
        _panel(axes, result, site, definition)
    for axes in grid.flat[len(result.sites) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel(label.replace(" (", "\n("))
    grid[0, 0].set_ylim(bottom=0)
    for axes in grid.flat[max(0, len(result.sites) - COLUMNS) : len(result.sites)]:
        axes.set_xlabel("layer (from 0)")
        axes.tick_params(labelbottom=True)
    grid.flat[-1].legend(*grid.flat[0].get_legend_handles_labels(), loc="center")
    made.suptitle(plain(f"{result.run.subject}: {label}, heads averaged"), fontsize=8)
    return made


def _panel(axes: Axes, result: Collapse, site: str, definition: str) -> None:
    layers = range(result.n_layers)
    kept, left = result.curve(site, definition)
    centred, centred_left = result.curve(site, f"{definition}_centred")
    axes.plot(layers, gaps(tuple(kept)), label="all rows")
    if result.sequences_massive:
        axes.plot(layers, gaps(tuple(left)), ls="--", label="without the massive token")
        axes.plot(layers, gaps(tuple(centred_left)), ls=":", label="without it, centred")
    else:
        axes.plot(layers, gaps(tuple(centred)), ls=":", label="centred")
    if result.me_layer is not None:
        axes.axvline(result.me_layer, color=ME_COLOUR, lw=0.8, label="ME Layer")
    axes.set_title(NAMES[site], loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


@figure(MetricProfile, "layers")
def draw_metric(result: MetricProfile, into: Into = None) -> Figure:
    """A metric by layer: its mean over sequences, and the range of single ones."""
    made, axes = panel(into, PAGE, 2.2)
    rows = result.rows()
    layers = [row["layer"] for row in rows]
    axes.fill_between(
        layers, [row["least"] for row in rows], [row["largest"] for row in rows], alpha=0.2, lw=0
    )
    axes.plot(layers, [row["mean"] for row in rows], marker=".")
    axes.set_xlabel("layer (from 0, block output)")
    axes.set_ylabel(f"{result.metric} ({result.unit})")
    axes.set_title(f"{result.run.subject}: {result.metric} of the residual", loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return made
