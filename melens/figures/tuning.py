"""Tuning: every setting that was raced, and what the held-out items say of the best."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from melens.figures.draw import (
    ME_COLOUR,
    PAGE,
    Into,
    figure,
    plain,
    sheet,
)
from melens.results.tune import Confirmed, Trial, Tuning

COLOURS = {"gamma": "C0", "activation": "C2", "product": "C3", "bottom": "C4", "bottom-gamma": "C5"}
CONTROL = "#777777"
MARKERS = {"after": "o", "next": "^"}
OTHER_LAYERS = "s"
SHIFT = 0.007
"""Along the rate, so that settings of one rate stand side by side."""


@figure(Tuning, "race")
def draw_tuning(result: Tuning, into: Into = None) -> Figure:
    """Left: development differences by rate. Right: held-out differences with their intervals."""
    height = max(3.1, 1.3 + 0.3 * len(result.confirmed))
    made = sheet(into, PAGE, height)
    race, held = made.subplots(1, 2, width_ratios=(1.1, 1))
    _race(race, result)
    _held_out(held, result)
    made.legend(handles=_legend(result), loc="outside lower center", ncols=4)
    made.suptitle(
        plain(f"{result.run.subject}: {len(result.trials)} settings of the mask, {result.metric}"),
        fontsize=8,
    )
    return made


def _race(axes: Axes, result: Tuning) -> None:
    """Filled: ran to the end; hollow: stopped. Larger: stronger."""
    kinds = list(dict.fromkeys((t.edit.select, t.edit.layers) for t in result.trials))
    for trial in result.trials:
        at = kinds.index((trial.edit.select, trial.edit.layers)) - (len(kinds) - 1) / 2
        colour = _colour(trial)
        axes.plot(
            trial.edit.rate + SHIFT * at,
            trial.delta,
            marker=_marker(trial),
            ls="",
            color=colour,
            ms=2.2 + 2.4 * trial.edit.strength,
            mew=0.6,
            mfc=colour if trial.stopped_after is None else "none",
        )
    axes.axhline(0, color="black", lw=0.6)
    sizes = sorted(abs(trial.delta) for trial in result.trials)
    typical = sizes[len(sizes) // 2]
    if sizes[-1] > 20 * typical > 0:  # one bad setting would press all others flat
        axes.set_yscale("symlog", linthresh=typical)
    axes.set_xlabel("rate (share of dimensions)")
    axes.set_ylabel(plain(f"edited - unedited, {result.unit}"))
    better = "higher" if result.higher_is_better else "lower"
    axes.set_title(f"development items ({better} is better)", loc="left")


def _held_out(axes: Axes, result: Tuning) -> None:
    axes.set_title("held-out items", loc="left")
    axes.set_xlabel(plain(f"edited - unedited, {result.unit}"))
    if not result.confirmed:
        axes.text(0.5, 0.5, "none run", ha="center", va="center", transform=axes.transAxes)
        axes.set_yticks([])
        return
    for y, row in enumerate(result.confirmed):
        colour = ME_COLOUR if row.edit == result.best else _colour(row)
        if row.corrected is not None:
            axes.plot(row.corrected, [y, y], color=colour, lw=0.8)
        if row.interval is not None:
            axes.plot(row.interval, [y, y], color=colour, lw=2.2, solid_capstyle="butt")
        axes.plot(row.delta, y, marker=_marker(row), color=colour, ls="", ms=5)
        if row.development is not None:
            axes.plot(row.development, y, marker="x", color="black", ls="", ms=4, mew=0.8)
    axes.axvline(0, color="black", lw=0.6)
    axes.set_yticks(range(len(result.confirmed)), [_name(row) for row in result.confirmed])
    axes.set_ylim(len(result.confirmed) - 0.5, -0.5)
    axes.margins(x=0.1)


def _legend(result: Tuning) -> list[Line2D]:
    def sign(label: str, marker: str = "o", **look: object) -> Line2D:
        settings = {"color": "black", "ls": "", "ms": 4, "mew": 0.8, **look}
        return Line2D([], [], marker=marker, label=label, **settings)  # type: ignore[arg-type]

    selects = dict.fromkeys(t.edit.select for t in result.trials)
    made = [
        sign(
            "random (control)" if select == "random" else select, color=COLOURS.get(select, CONTROL)
        )
        for select in selects
    ]
    layers = [row.edit.layers for row in (*result.trials, *result.confirmed)]
    named = {"after": "all later layers", "next": "next layer"}
    made += [sign(named[k], MARKERS[k], mfc="none") for k in named if k in layers]
    if any(layer not in named for layer in layers):
        made.append(sign("other layers", OTHER_LAYERS, mfc="none"))
    if len({trial.edit.strength for trial in result.trials}) > 1:
        made.append(sign("larger: stronger", ms=2.2 + 2.4, color=CONTROL))
    if any(trial.stopped_after for trial in result.trials):
        made.append(sign("hollow left: stopped early", mfc="none", color=CONTROL))
    if result.confirmed:
        made.append(sign("the same in development", "x"))
    if any(row.interval is not None for row in result.confirmed):
        made.append(sign("95 % interval", "", ls="-", lw=2.2))
    if any(row.corrected is not None for row in result.confirmed):
        made.append(sign("corrected for those confirmed", "", ls="-", lw=0.8))
    if result.best is not None:
        made.append(sign("found better", color=ME_COLOUR))
    return made


def _colour(row: Trial | Confirmed) -> str:
    return CONTROL if row.role == "control" else COLOURS.get(row.edit.select, CONTROL)


def _marker(row: Trial | Confirmed) -> str:
    layers = row.edit.layers
    return MARKERS[layers] if isinstance(layers, str) else OTHER_LAYERS


def _name(row: Confirmed) -> str:
    """Two lines: the rule with its rate and strength, and the layers."""
    edit = row.edit
    label = edit.label.removeprefix("wemask ")
    where = edit.changed(select="gamma", rate=0.5, strength=1.0).label
    where = where.removeprefix("wemask gamma rate 0.5 ")
    role = ", control" if row.role == "control" else ""
    return plain(f"{label.removesuffix(where).strip()}\n{where}{role}")
