"""Two models side by side: how large activations are at each layer, and by what factor."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from melens.figures.draw import (
    PAGE,
    Into,
    figure,
    layer_axis,
    plain,
    sheet,
)
from melens.results.diff import Difference, SideInfo

A, B = "#0072B2", "#D55E00"
LONGEST = 40
"""Characters of a name; two and the verdict fit above the figure."""
TICKS = (1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, 30, 100, 1000, 10_000, 100_000)


@figure(Difference, "profiles")
def draw_profiles(result: Difference, into: Into = None) -> Figure:
    """Top: largest |x| of both on a log scale, their ME Layers marked. Bottom: b over a."""
    made = sheet(into, PAGE, 3.6)
    top, bottom = made.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    _sizes(top, result)
    _ratios(bottom, result)
    layer_axis(bottom)
    made.align_ylabels()
    made.legend(loc="outside lower center", ncols=2)
    return made


def _sizes(axes: Axes, result: Difference) -> None:
    names = _names(result)
    sides = (
        ("max_a", "o", "-", A, names[0], result.a),
        ("max_b", "x", "--", B, names[1], result.b),
    )
    for field, marker, line, colour, name, side in sides:
        rows = [row for row in result.profile if getattr(row, field) is not None]
        axes.semilogy(
            [row.layer for row in rows],
            [getattr(row, field) for row in rows],
            marker=marker,
            ls=line,
            color=colour,
            ms=4,
            label=f"{name} ({_where(side)})",
        )
        if side.me_layer is not None:
            axes.axvline(side.me_layer, color=colour, ls=line, lw=0.8)
    axes.set_ylabel("largest |x| (residual units)")
    verdict = "changed" if result.verdict == "changed" else "the same within tolerance"
    axes.set_title(f"{names[1]} compared with {names[0]}: {verdict}", loc="left")
    axes.grid(visible=True, axis="y")


def _ratios(axes: Axes, result: Difference) -> None:
    rows = [row for row in result.profile if row.ratio]
    axes.axhline(1, color="black", lw=0.6)
    axes.plot(
        [row.layer for row in rows], [row.ratio or 1.0 for row in rows], marker="s", color="#333333"
    )
    axes.set_yscale("log")
    spread = max((max(row.ratio or 1, 1 / (row.ratio or 1)) for row in rows), default=1.0)
    bound = max(1.1, spread**1.15)
    axes.set_ylim(1 / bound, bound)
    tick = max(tick for tick in TICKS if tick <= bound)
    axes.set_yticks([1 / tick, 1, tick], [f"1/{tick:g}", "1", f"{tick:g}"])
    axes.set_yticks([], minor=True)
    axes.set_ylabel("B / A")


def _names(result: Difference) -> tuple[str, str]:
    """A and B by name; with their dtypes where the name is one, so that B / A can be read."""
    sides = (result.a, result.b)
    apart = result.a.name == result.b.name and result.a.dtype != result.b.dtype
    first, second = (
        plain(f"{_short(side.name)}, {side.dtype}" if apart else _short(side.name))
        for side in sides
    )
    return f"A = {first}", f"B = {second}"


def _short(name: str) -> str:
    """The end of a long name, where the part stands that tells two paths apart."""
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def _where(side: SideInfo) -> str:
    return "nothing massive" if side.me_layer is None else f"ME Layer {side.me_layer}"
