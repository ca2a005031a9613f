"""A training over its steps: losses, and what became of the massive activation and its sink."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from melens.figures.draw import (
    LAYER_LABEL,
    ME_COLOUR,
    PAGE,
    Into,
    figure,
    panel,
    plain,
    sheet,
)
from melens.results.finetune import EmergenceRow, FineTuning

KEYS, SINKS = "#0072B2", "#009E73"
Value = Callable[[EmergenceRow], float | None]


@figure(FineTuning, "training")
def draw_training(result: FineTuning, into: Into = None) -> Figure:
    """Left: the loss by step. Right: coordinate, sinks and key rank, each over its start."""
    made = sheet(into, PAGE, 2.8)
    losses, looks = made.subplots(1, 2)
    _losses(losses, result)
    _looks(looks, result)
    for axes in (losses, looks):
        axes.set_xlabel("step")
    made.suptitle(plain(f"{result.run.model}: {result.method}, mask {_mask(result)}"), fontsize=8)
    return made


@figure(FineTuning, "layers")
def draw_layers(result: FineTuning, into: Into = None) -> Figure:
    """Largest |x| of every block output, one line a look, the last in colour."""
    made, axes = panel(into, PAGE * 0.6, 2.8)
    shades = mpl.colormaps["Greys"]
    looks = [look for look in result.looks if look.by_layer]
    for number, look in enumerate(looks, start=1):
        last = number == len(looks)
        colour = ME_COLOUR if last else shades(0.3 + 0.5 * number / len(looks))
        named = number == 1 or last
        axes.plot(look.by_layer, color=colour, label=f"step {look.step}" if named else None)
    axes.set_yscale("log")
    axes.set_xlabel(LAYER_LABEL)
    axes.set_ylabel("largest |x|, residual units")
    if looks:
        axes.legend()
    axes.set_title(plain(result.run.model), fontsize=8)
    return made


def _mask(result: FineTuning) -> str:
    return "none" if result.mask.name == "none" else f"{result.mask.label}, {result.masked_in}"


def _losses(axes: Axes, result: FineTuning) -> None:
    known = [(row.step, row.loss) for row in result.losses if row.loss is not None]
    if known:
        axes.plot(*zip(*known, strict=True), color="0.55", label="training")
    held = [(row.step, row.held_out) for row in result.losses if row.held_out is not None]
    if held:
        axes.plot(*zip(*held, strict=True), "o-", color=ME_COLOUR, ms=3, label="held-out rows")
    axes.set_ylabel("loss, nats a token" if result.objective == "sft" else "loss")
    if known or held:
        axes.legend()


def _looks(axes: Axes, result: FineTuning) -> None:
    """Shares of what the first look saw; a quantity that began at 0 has none."""
    drawn: tuple[tuple[str, str, str, Value], ...] = (
        ("|massive coordinate|", ME_COLOUR, "o", lambda row: row.coordinate),
        ("sink rate", SINKS, "s", lambda row: row.sink_rate),
        ("effective rank of keys", KEYS, "^", lambda row: row.key_rank),
    )
    for label, colour, marker, value in drawn:
        points = _shares(result.looks, value)
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, color=colour, ms=3, label=label)
    axes.axhline(1, color="0.8", lw=0.6, zorder=0)
    axes.set_ylabel("over its value at the first look")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _shares(looks: tuple[EmergenceRow, ...], value: Value) -> list[tuple[int, float]]:
    found = [(look.step, value(look)) for look in looks]
    first = next((abs(v) for _, v in found if v is not None), 0.0)
    return [(step, abs(v) / first) for step, v in found if v is not None and first]
