"""Super weights: how far every layer's FFN spikes, and what removing each weight costs."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from melens.figures.styles import ME_COLOUR, PAGE, Drawing, figure, plain
from melens.results.super_weights import Interval, SuperWeights

MUTED = "#777777"


@figure(SuperWeights, "spikes")
def draw_spikes(result: SuperWeights) -> Figure:
    """Left: largest |input| and |output| by layer. Right: loss without each weight, paired.

    Grey: no more than the control.
    """
    bars = len(result.super_weights) + 2 * (result.together is not None)
    made = Drawing(figsize=(PAGE, max(2.9, 1.2 + 0.19 * bars)), layout="constrained")
    spikes, costs = made.subplots(1, 2, width_ratios=(1.15, 1))
    _spikes(spikes, result)
    _costs(costs, result)
    handles = [axes.get_legend_handles_labels() for axes in (spikes, costs)]
    made.legend(
        [h for hs, _ in handles for h in hs], [name for _, names in handles for name in names],
        loc="outside lower center", ncols=3,
    )  # fmt: skip
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
            [at[0] for at in marked], [heights[at] for at in marked], s=42, facecolors="none",
            edgecolors=ME_COLOUR, linewidths=1.0, zorder=3, label="a weight spikes here",
        )  # fmt: skip
    axes.set_ylabel("largest |x|")
    axes.set_xlabel("layer (counted from 0)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


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
    names = [f"({w.layer}, {w.row}, {w.column})" for w in result.super_weights]
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
