"""Isolation: the 2 x 2, the path, neurons, gains; super weights and what removing each costs."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from melens.figures.draw import (
    COLUMN,
    ME_COLOUR,
    PAGE,
    Into,
    figure,
    layer_axis,
    panel,
    plain,
    shared_legend,
    sheet,
)
from melens.formatting import Interval
from melens.results.isolate import Cell, Isolation
from melens.results.super_weights import SuperWeights

CELLS = {
    "kept_kept": "as it is",
    "flat_kept": "flat norm",
    "kept_edited": "FFN edited",
    "flat_edited": "both",
}
BLUE, GREY = "#0072B2", "#999999"
LEAST = 1e-4
"""Shares below this are drawn at the edge of a log axis."""


@figure(Isolation, "factorial")
def draw_factorial(result: Isolation, into: Into = None) -> Figure:
    """Coordinate, sinks and loss in the four cells, as points: a log axis has no foot for a bar.

    Grey: the same edits at all other layers.
    """
    made = sheet(into, PAGE, 2.7)
    left, middle, right = made.subplots(1, 3)
    cells = [getattr(result.factorial, name) for name in CELLS]
    _cells(left, [max(abs(c.left), LEAST) for c in cells], [c.left_interval for c in cells])
    left.set_yscale("log")
    left.set_ylim(LEAST / 2, 3)
    left.set_title("coordinate left (share)", loc="left")
    _cells(middle, [c.sink_rate for c in cells], [c.sink_interval for c in cells])
    middle.set_ylim(0, 1.03)
    middle.set_title("sink rate (alpha > 0.3)", loc="left")
    _cells(right, [c.loss_delta for c in cells], [c.loss_interval for c in cells])
    right.axhline(0, color="black", lw=0.6)
    right.set_title("change of loss (nats)", loc="left")
    for x, name in ((1.25, "flat"), (2.25, "edited")):
        others = [c for row in result.controls.layers if (c := getattr(row, name)) is not None]
        _dots(left, x, [max(abs(c.left), LEAST) for c in others])
        _dots(middle, x, [c.sink_rate for c in others])
        _dots(right, x, [c.loss_delta for c in others])
    where = f"{result.role(result.layer)}, dimension {result.dim}; grey: every other layer"
    made.suptitle(plain(f"{result.run.subject}: {where}"), fontsize=8)
    return made


def _cells(axes: Axes, values: list[float], intervals: list[tuple[float, float] | None]) -> None:
    axes.plot(range(len(values)), values, ls="", marker="o", ms=5, color=BLUE)
    for x, found in enumerate(intervals):
        if found is not None:
            axes.vlines(x, *found, color=BLUE, lw=1.2)
    axes.grid(visible=True, axis="y")
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.set_xticks(range(len(values)), CELLS.values(), rotation=20, fontsize=7)


def _dots(axes: Axes, x: float, values: list[float]) -> None:
    axes.plot([x] * len(values), values, ls="", marker=".", ms=3, color=GREY)


@figure(Isolation, "layers")
def draw_layers(result: Isolation, into: Into = None) -> Figure:
    """Every block's write dropped, put in alone; and the two edits at every layer."""
    made = sheet(into, PAGE, 5.0)
    top, middle, bottom = made.subplots(3, 1, sharex=True)
    for axes, writes, title in (
        (top, result.necessity, "left without this write"),
        (middle, result.sufficiency, "made by this write in an ordinary token"),
    ):
        for part, marker in (("attention", "s"), ("ffn", "o")):
            rows = [write for write in writes if write.part == part]
            axes.plot([w.layer for w in rows], [w.left for w in rows], marker=marker, label=part)
        axes.set_title(f"{title} (share of the coordinate)", loc="left")
        axes.axhline(0, color="black", lw=0.6)
        if axes is middle and result.ordinary is not None:
            axes.axhline(result.ordinary, color=GREY, lw=0.8, ls=":", label="its own")
        axes.legend(loc="upper right", ncols=3)
    here = {"flat": result.factorial.flat_kept, "edited": result.factorial.kept_edited}
    for name, label in (("flat", "flat norm"), ("edited", "FFN edited")):
        cells: dict[int, Cell | None] = {c.layer: getattr(c, name) for c in result.controls.layers}
        cells[result.layer] = here[name]
        known = sorted((n, c.left) for n, c in cells.items() if c is not None)
        bottom.plot([n for n, _ in known], [left for _, left in known], marker="o", label=label)
    bottom.set_title("left with the same edit at each layer", loc="left")
    bottom.legend(loc="lower right", ncols=2)
    for axes in (top, middle, bottom):
        axes.axvline(result.layer, color=ME_COLOUR, lw=0.8)
    layer_axis(bottom, f"layer (counted from 0); line: layer {result.layer}, the one edited")
    made.suptitle(plain(f"{result.run.subject}, dimension {result.dim}"), fontsize=8)
    return made


@figure(Isolation, "path")
def draw_path(result: Isolation, into: Into = None) -> Figure:
    """How the massive token's norm grows against the others' through the FFN branch."""
    made, axes = panel(into, COLUMN, 2.6)
    names = [step.site for step in result.path]
    axes.semilogy(names, [step.ratio for step in result.path], marker="o", color=BLUE)
    for step in result.path:
        axes.annotate(
            f"{step.ratio:.3g}",
            (step.site, step.ratio),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=7,
        )
    axes.axhline(1, color="black", lw=0.6)
    axes.margins(x=0.08, y=0.15)
    axes.set_ylabel("norm over median of others")
    axes.tick_params(axis="x", rotation=30)
    axes.set_title(plain(f"{result.run.subject}, layer {result.layer} (from 0)"), loc="left")
    return made


@figure(Isolation, "neurons")
def draw_neurons(result: Isolation, into: Into = None) -> Figure:
    """The neurons that write the massive coordinate, layer by layer."""
    made, axes = panel(into, PAGE, 2.6)
    amounts = {row.layer: row.written for row in result.decompositions}
    rows = [n for n in result.neurons if n.layer in amounts]
    labels = [f"{n.layer} / {n.neuron}" for n in rows]
    values = [n.share * amounts[n.layer] for n in rows]
    colours = [BLUE if v >= 0 else ME_COLOUR for v in values]
    axes.scatter(range(len(rows)), values, c=colours, s=22, zorder=3)
    axes.set_xticks(range(len(rows)), labels)
    for x in range(1, len(rows)):
        if rows[x].layer != rows[x - 1].layer:
            axes.axvline(x - 0.5, color="0.85", lw=0.6)
    axes.grid(visible=True, axis="y")
    axes.axhline(0, color="black", lw=0.6)
    largest = max(map(abs, values), default=1.0)
    axes.set_yscale("symlog", linthresh=max(largest / 1000, 1e-9))
    low, high = min(values, default=0.0), max(values, default=0.0)
    axes.set_ylim(3 * min(low, -largest / 1000), 3 * max(high, largest / 1000))
    axes.set_ylabel(f"written into dimension {result.dim}")
    axes.tick_params(axis="x", rotation=90)
    axes.set_xlabel("layer (from 0) / neuron")
    axes.set_title(plain(result.run.subject), loc="left")
    return made


@figure(Isolation, "gains")
def draw_gains(result: Isolation, into: Into = None) -> Figure:
    """What each dimension's gain does: its size, and what is left with it set to the mean."""
    made, axes = panel(into, COLUMN, 2.6)
    if result.gains is None:
        axes.text(0.5, 0.5, "no norm before the FFN", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return made
    axes.plot(result.gains.gains, result.gains.left, ls="", marker=".", ms=3, color=BLUE)
    for d in result.gains.top[:5]:
        at = result.gains.gains[d], result.gains.left[d]
        axes.annotate(str(d), at, xytext=(3, 2), textcoords="offset points", fontsize=7)
    axes.axvline(result.gains.mean, color="black", lw=0.6, ls=":")
    axes.set_xlabel(f"gain of {result.gains.norm} (dotted: mean)")
    axes.set_ylabel("write left, this gain at the mean")
    axes.set_title(plain(f"{result.run.subject}, layer {result.layer} (from 0)"), loc="left")
    return made


MUTED = "#777777"


@figure(SuperWeights, "spikes")
def draw_spikes(result: SuperWeights, into: Into = None) -> Figure:
    """Left: largest |input| and |output| by layer. Right: loss without each weight, paired.

    Grey: no more than the control.
    """
    bars = len(result.super_weights) + 2 * (result.together is not None)
    made = sheet(into, PAGE, max(2.9, 1.2 + 0.19 * bars))
    spikes, costs = made.subplots(1, 2, width_ratios=(1.15, 1))
    _spikes(spikes, result)
    _costs(costs, result)
    shared_legend(made, spikes, costs, columns=3)
    title = f"{result.run.subject}: weights that spike (layer, row, column)"
    made.suptitle(plain(title), fontsize=8)
    return made


def _spikes(axes: Axes, result: SuperWeights) -> None:
    """Layers that were not looked at are left out."""
    layers = [row.layer for row in result.profile]
    axes.plot(
        layers, [row.input for row in result.profile], marker="o", label="FFN product (input)"
    )
    axes.plot(
        layers, [row.output for row in result.profile], marker="s", label="down projection's output"
    )
    if any(row.write is not None for row in result.profile):
        writes = [float("nan") if row.write is None else row.write for row in result.profile]
        axes.plot(layers, writes, marker="^", color="black", label="write, after the norm")
    axes.set_yscale("log")
    marked = sorted({(weight.layer, weight.site) for weight in result.super_weights})
    heights = {(row.layer, "output"): row.output for row in result.profile}
    heights |= {(row.layer, "write"): row.write or 0.0 for row in result.profile}
    if marked:
        axes.scatter(
            [at[0] for at in marked],
            [heights[at] for at in marked],
            s=42,
            facecolors="none",
            edgecolors=ME_COLOUR,
            linewidths=1.0,
            zorder=3,
            label="a weight spikes here",
        )
    axes.set_ylabel("largest |x|")
    layer_axis(axes, "layer (counted from 0)")


def _costs(axes: Axes, result: SuperWeights) -> None:
    axes.set_xlabel(f"loss change, nats a token (base {result.base_loss:.2f})")
    if result.together is None or result.control is None:
        axes.text(0.5, 0.5, "none found", ha="center", va="center", transform=axes.transAxes)
        axes.set_yticks([])
        return
    n = len(result.super_weights)
    for y, weight in enumerate(result.super_weights):
        colour = "C0" if result.is_super(weight) else MUTED
        _point(axes, y, weight.loss_delta, weight.interval, "o", colour)
        axes.plot(weight.neuron_loss_delta, y, marker="x", color=MUTED, ls="", ms=4)
    _point(axes, n, result.together.loss_delta, result.together.interval, "D", ME_COLOUR)
    _point(axes, n + 1, result.control.loss_delta, result.control.interval, "D", MUTED)
    if result.supers:
        axes.plot([], [], marker="o", color="C0", ls="", label="super weight removed")
    if result.large:
        axes.plot([], [], marker="o", color=MUTED, ls="", label="large weight removed")
    axes.plot([], [], marker="x", color=MUTED, ls="", ms=4, label="its whole neuron")
    names = [
        f"({w.layer}, {w.row}, {w.column})" + ("" if w.expert is None else f" of e{w.expert}")
        for w in result.super_weights
    ]
    axes.set_yticks(range(n + 2), [*names, f"all {n} together", f"control: {n} of like size"])
    axes.set_ylim(n + 1.6, -0.6)
    axes.set_xscale("symlog", linthresh=0.1)
    axes.axvline(0, color="black", lw=0.6)
    axes.margins(x=0.1)


def _point(
    axes: Axes, y: int, value: float, interval: Interval | None, marker: str, colour: str
) -> None:
    axes.plot(value, y, marker=marker, color=colour, ls="", ms=4)
    if interval is not None:
        axes.plot(interval, [y, y], color=colour, lw=1.0)
