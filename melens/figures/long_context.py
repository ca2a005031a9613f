"""Long context: heat maps over length x depth, one a condition; loss by position in the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from melens.figures.draw import (
    PAGE,
    Into,
    figure,
    plain,
    shared_legend,
    sheet,
)
from melens.results.long_context import LengthCell, LongCondition, LongContext

COLOURS = "cividis"
"""Even in lightness, and told apart by colour-blind readers."""
ACROSS = 3
LONGEST = 34
LINEAR = 0.1
"""Nats; smaller differences are drawn to scale."""
MARKERS = "os^Dvx*"
ROLES = {"base": "no edit", "edited": "edited", "control": "control", "dose": "dose"}


@figure(LongContext, "found")
def draw_found(result: LongContext, into: Into = None) -> Figure:
    """Share of answers found; base, the edit and its controls on one colour scale."""
    return _maps(result, lambda cell: cell.found / cell.n, 1.0, "share of answers found", into)


@figure(LongContext, "answer-loss")
def draw_answer_loss(result: LongContext, into: Into = None) -> Figure:
    """Mean loss of the answers' tokens: what changes while no answer does."""
    top = max(cell.loss for c in _shown(result) for cell in c.cells) or 1.0
    return _maps(result, lambda cell: cell.loss, top, "loss of the answer, nats a token", into)


@figure(LongContext, "positions")
def draw_positions(result: LongContext, into: Into = None) -> Figure:
    """Left: loss of plain texts by position. Right: every edit's difference, with its interval."""
    made = sheet(into, PAGE, 3.4)
    losses, changes = made.subplots(1, 2)
    if not result.texts:
        for axes in (losses, changes):
            axes.text(
                0.5, 0.5, "no plain texts", ha="center", va="center", transform=axes.transAxes
            )
            axes.set_xticks([])
            axes.set_yticks([])
    else:
        _losses(losses, result)
        _changes(changes, result)
        shared_legend(made, losses, columns=2)
    bands = any(part.loss.interval for c in _shown(result) for part in c.bins)
    said = "mean and 95 % over texts" if bands else "mean"
    made.suptitle(plain(f"{result.run.subject}: {result.texts} plain texts, {said}"), fontsize=8)
    return made


def _shown(result: LongContext) -> tuple[LongCondition, ...]:
    return (result.base, result.edited, *result.controls)


def _maps(
    result: LongContext, value: Callable[[LengthCell], float], top: float, label: str, into: Into
) -> Figure:
    shown = _shown(result)
    across = 2 if len(shown) in (2, 4) else ACROSS
    down = -(-len(shown) // across)
    height = down * (0.75 + 0.24 * max(3, len(result.depths))) + 0.7
    made = sheet(into, PAGE, height)
    panels = made.subplots(down, across, squeeze=False, sharey=True)
    image = None
    for axes, condition in zip(panels.flat, shown, strict=False):
        grid = [
            [value(condition.cell(length, depth)) for length in result.lengths]
            for depth in result.depths
        ]
        image = axes.imshow(
            grid, cmap=COLOURS, vmin=0, vmax=top, aspect="auto", interpolation="nearest"
        )
        _write(axes, grid, top)
        axes.set_title(plain(_title(condition)), loc="left", fontsize=7)
        axes.set_xticks(range(len(result.lengths)), [str(n) for n in result.lengths])
        axes.set_yticks(range(len(result.depths)), [f"{depth:.0%}" for depth in result.depths])
        axes.set_xlabel("length (tokens)")
    for axes in panels[:, 0]:
        axes.set_ylabel("depth in the text")
    for axes in list(panels.flat)[len(shown) :]:
        axes.set_axis_off()
    assert image is not None
    made.colorbar(image, ax=list(panels.flat), label=label, aspect=30, pad=0.02)
    hidden = f"{result.needles} numbers, one asked for" if result.needles > 1 else "one number"
    made.suptitle(
        plain(f"{result.run.subject}, {result.task}: {hidden}; {result.seeds} items a cell"),
        fontsize=8,
    )
    return made


def _write(axes: Axes, grid: Sequence[Sequence[float]], top: float) -> None:
    """The numbers in the cells, light on dark and dark on light."""
    size = 7 if len(grid[0]) <= 6 else 5
    for y, row in enumerate(grid):
        for x, number in enumerate(row):
            red, green, blue, _ = mpl.colormaps[COLOURS](number / top)
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axes.text(
                x,
                y,
                f"{number:.2f}",
                ha="center",
                va="center",
                fontsize=size,
                color="white" if dark else "black",
            )


def _title(condition: LongCondition) -> str:
    """Role and edit, over as many lines as a panel's width asks for."""
    words, lines = _name(condition).split(" "), [""]
    for word in words:
        if len(lines[-1]) + len(word) > LONGEST:
            lines.append("")
        lines[-1] += f"{word} "
    return "\n".join(line.rstrip() for line in lines)


def _name(condition: LongCondition) -> str:
    if condition.role == "base":
        return ROLES["base"]
    return f"{ROLES.get(condition.role, condition.role)}: {condition.edit.label}"


def _losses(axes: Axes, result: LongContext) -> None:
    for i, condition in enumerate(_shown(result)):
        points = [(part.loss.value, part.loss.interval) for part in condition.bins]
        _curve(axes, i, condition, points, band=condition.role == "base")
    axes.set_ylabel("loss, nats a token")
    _position_axis(axes)


def _changes(axes: Axes, result: LongContext) -> None:
    for i, condition in enumerate(_shown(result)):
        if condition.role != "base":
            parts = [part.delta for part in condition.bins if part.delta is not None]
            points = [(part.value, part.interval) for part in parts]
            _curve(axes, i, condition, points, band=True)
    axes.axhline(0, color="black", lw=0.6)
    axes.set_yscale("symlog", linthresh=LINEAR)  # the first positions differ by far the most
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel(f"difference to no edit, nats a token\n(linear below {LINEAR:g}, log above)")
    _position_axis(axes)


def _curve(
    axes: Axes,
    i: int,
    condition: LongCondition,
    points: Sequence[tuple[float, tuple[float, float] | None]],
    *,
    band: bool,
) -> None:
    """A line through the middles of the bins, its interval as a band."""
    colour = "black" if condition.role == "base" else f"C{i - 1}"
    middles = [(part.start * (part.stop - 1)) ** 0.5 for part in condition.bins]
    axes.plot(
        middles,
        [value for value, _ in points],
        color=colour,
        marker=MARKERS[i % len(MARKERS)],
        ls="--" if condition.role == "control" else "-",
        label=plain(_name(condition)),
    )
    known = [(x, *within) for x, (_, within) in zip(middles, points, strict=True) if within]
    if known and band:
        xs, lows, highs = zip(*known, strict=True)
        axes.fill_between(xs, lows, highs, color=colour, alpha=0.15, lw=0)


def _position_axis(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("position in the text (from 0; log-spaced bins)")
