"""Evaluations: the effect against the dose beside its controls, one or several of one task."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from melens.errors import ResultError
from melens.figures.draw import (
    ME_COLOUR,
    PAGE,
    Into,
    figure,
    house_style,
    legend_below,
    panel,
    plain,
    shared_legend,
    sheet,
    title_above,
)
from melens.results.evaluation import ConditionScore, Evaluation

BLUE, GREY, GREEN, BLACK = "#0072B2", "#777777", "#009E73", "black"
COLOURS = {"dose": BLUE, "edited": ME_COLOUR, "control": GREY, "rival": GREEN}
MARKERS = {"dose": "o", "edited": "D", "control": "s", "rival": "^"}
SHORT = 26
"""Characters of a label's line that a panel of 1.6 inches holds."""
ROUNDING = 1e-9
"""Differences that are smaller everywhere are drawn as none."""
SHOWN = {"dose": "other doses", "edited": "the edit", "control": "controls", "rival": "other edits"}


@figure(Evaluation, "dose")
def draw_dose(result: Evaluation, into: Into = None) -> Figure:
    """Difference to no edit against the dose; controls and other edits; masked energy below."""
    others = (*result.controls, *result.rivals)
    if not result.dose:  # one dose is no curve
        made = sheet(into, PAGE, 1.6 + 0.22 * len(others))
        beside = made.subplots()
    else:
        height = max(3.4, 1.5 + 0.22 * (1 + len(others)))
        made = sheet(into, PAGE, height)
        beside = _with_curve(made, result)
    _beside(beside, result, others)
    for role in ("dose", "edited", "control", "rival"):
        if any(c.role == role for c in result.conditions):
            look = {"ls": "", "marker": MARKERS[role], "color": COLOURS[role]}
            beside.plot([], [], label=SHOWN[role], **look)  # type: ignore[arg-type]
    shared_legend(made, beside, columns=4)
    made.suptitle(plain(_title(result)), fontsize=8)
    return made


def _with_curve(made: Figure, result: Evaluation) -> Axes:
    """Draws the effect by dose on the left, with the masked energy below; the axes on the right."""
    masks = any(c.energy is not None for c in result.conditions)
    heights = (3, 1) if masks else (1,)
    grid = made.add_gridspec(len(heights), 2, width_ratios=(1, 1.05), height_ratios=heights)
    curve = made.add_subplot(grid[0, 0])
    _curve(curve, result)
    if masks:
        curve.tick_params(labelbottom=False)
        below = made.add_subplot(grid[1, 0], sharex=curve)
        _energy(below, _doses(result))
        below.set_xlabel(_dose_name(result))
        made.align_ylabels((curve, below))
    else:
        curve.set_xlabel(_dose_name(result))
    return made.add_subplot(grid[:, 1])


def _doses(result: Evaluation) -> list[ConditionScore]:
    return sorted((result.edited, *result.dose), key=lambda c: _dose(result, c))


def _dose(result: Evaluation, condition: ConditionScore) -> float:
    return getattr(condition.edit, result.edit.dosed_by)


def _dose_name(result: Evaluation) -> str:
    if result.edit.dosed_by == "rate":
        return "rate (share of the dimensions masked)"
    return f"strength of {result.edit.name} (1 = the whole edit)"


def _curve(axes: Axes, result: Evaluation) -> None:
    doses = _doses(result)
    axes.plot(
        [_dose(result, c) for c in doses], [_delta(c) for c in doses], color=BLUE, lw=0.8, zorder=1
    )
    for c in doses:
        x, interval = _dose(result, c), c.delta.interval if c.delta else None
        if interval is not None:
            axes.vlines(x, *interval, color=COLOURS[c.role], lw=1.0, zorder=2)
        axes.plot(x, _delta(c), MARKERS[c.role], color=COLOURS[c.role], ms=4, zorder=3)
    axes.axhline(0, color=BLACK, lw=0.6)
    axes.set_xlim(0, 1.03)
    if _all_zero(doses):
        axes.set_ylim(-0.05, 0.05)
    axes.set_ylabel(_label(result, "\n"))


def _all_zero(conditions: Sequence[ConditionScore]) -> bool:
    """Whether an axis of its own choice would show rounding errors."""
    return all(abs(x) < ROUNDING for c in conditions for x in (_delta(c), *_interval(c)))


def _energy(axes: Axes, doses: Sequence[ConditionScore]) -> None:
    """What the rate takes away of the token: a rate by itself says little."""
    held = [(c.edit.rate, c.energy) for c in doses if c.energy is not None]
    axes.plot([rate for rate, _ in held], [energy for _, energy in held], "o-", color=BLACK, lw=0.8)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(-0.05, 1.08)
    axes.set_yticks((0, 0.5, 1))
    axes.set_ylabel("energy\nmasked")


def _beside(axes: Axes, result: Evaluation, others: Sequence[ConditionScore]) -> None:
    """The edit, its controls and other edits, a line each."""
    shown = (result.edited, *others)
    for y, c in enumerate(shown):
        interval = c.delta.interval if c.delta else None
        if interval is not None:
            axes.hlines(y, *interval, color=COLOURS[c.role], lw=1.0)
        axes.plot(_delta(c), y, MARKERS[c.role], color=COLOURS[c.role], ms=4)
    low, high = _interval(result.edited)
    axes.axvspan(low, high, color=ME_COLOUR, alpha=0.12, lw=0)
    axes.axvline(0, color=BLACK, lw=0.6)
    names = [_edit_name(c) for c in shown]
    axes.set_yticks(range(len(shown)), [plain(name) for name in names], fontsize=6.5)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    if _all_zero(shown):
        axes.set_xlim(-0.05, 0.05)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlabel(_label(result, " "))


def _edit_name(condition: ConditionScore) -> str:
    if condition.role == "edited":
        return "the edit"
    if condition.name != "other layers":
        return condition.name
    label = condition.edit.label
    return f"the same in\n{label[label.rindex('layer') :]}" if "layer" in label else condition.name


def _interval(condition: ConditionScore) -> tuple[float, float]:
    found = condition.delta.interval if condition.delta else None
    return found or (_delta(condition), _delta(condition))


def _delta(condition: ConditionScore) -> float:
    return condition.delta.value if condition.delta else 0.0


def _label(result: Evaluation, between: str) -> str:
    """What the difference is in; over lines short enough for a low panel where they may break."""
    better = "higher" if result.higher_is_better else "lower"
    what = plain(f"change, {result.unit}")
    if between == "\n":
        what = textwrap.fill(what, SHORT)
    return f"{what}{between}({better} is better)"


def _title(result: Evaluation) -> str:
    return (
        f"{result.run.subject}, {result.task}, {result.n} items; the edit: {result.edit.label}\n"
        f"{result.base.value:.4g} {result.unit} without it; {_bars(result.conditions)}"
    )


def _bars(conditions: Sequence[ConditionScore]) -> str:
    """What the bars are, where there are any."""
    if any(c.delta is not None and c.delta.interval is not None for c in conditions):
        return "bars: 95 % over items, paired"
    return "paired; no interval, as there are too few items or all are alike"


@figure(Evaluation, "paired")
def draw_paired(result: Evaluation, into: Into = None) -> Figure:
    """Every item's difference, sorted, with the mean and its interval."""
    made, axes = panel(into, PAGE, 2.9)
    found = sorted(result.differences.get("edited", ()))
    if not found:
        axes.text(
            0.5,
            0.5,
            "no differences of items in this file",
            ha="center",
            va="center",
            transform=axes.transAxes,
        )
        axes.set_axis_off()
        return made
    few = len(found) <= 60
    axes.vlines(range(1, len(found) + 1), 0, found, color=BLUE, lw=1.0 if few else 0.5, alpha=0.8)
    axes.plot(range(1, len(found) + 1), found, "o", color=BLUE, ms=3 if few else 1.5, label="item")
    mean = "mean" if len(set(result.weights)) == 1 else "mean, items weighted by their tokens"
    axes.axhline(result.delta.value, color=ME_COLOUR, lw=1.0, label=mean)
    if result.delta.interval is not None:
        axes.axhspan(
            *result.delta.interval, color=ME_COLOUR, alpha=0.2, lw=0, label="its 95 % interval"
        )
    axes.axhline(0, color=BLACK, lw=0.6)
    axes.set_ylabel(_label(result, "\n"))
    axes.set_xlabel(f"item, sorted ({_counts(result, found)})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    legend_below(made, axes, into, columns=3)
    what = f"{result.run.subject}, {result.task}, {result.n} items: {result.edit.label} - no edit"
    title_above(made, axes, into, what)
    return made


def _counts(result: Evaluation, found: Sequence[float]) -> str:
    sign = 1 if result.higher_is_better else -1
    better = sum(sign * x > 0 for x in found)
    worse = sum(sign * x < 0 for x in found)
    return f"{better} better, {worse} worse, {len(found) - better - worse} equal"


STYLES = ("-", "--", ":", "-.")
APART = 0.006
"""Rates by which lines stand beside each other, so that no interval hides another."""
GRID_MARKERS = ("o", "s", "^", "v", "D", "P")


def draw_dose_grid(results: Sequence[Evaluation]) -> Figure:
    """A panel for each choice of layers; colour = rule, line = strength; bars 95 %, paired.

    Args:    results: masks on one task, one model and the same items.
    Raises:  ResultError: none, or of several tasks, models or sets of items.
    """
    _check_same(results)
    layers = list(dict.fromkeys(r.edit.layers for r in results))
    rules = list(dict.fromkeys(r.edit.select for r in results))
    strengths = sorted({r.edit.strength for r in results}, reverse=True)
    first = results[0]
    with house_style():
        made = sheet(None, PAGE, 3.2)
        panels = made.subplots(1, len(layers), sharey=True, squeeze=False)[0]
        for axes, chosen in zip(panels, layers, strict=True):
            here = [result for result in results if result.edit.layers == chosen]
            for i, result in enumerate(here):
                rule = rules.index(result.edit.select)
                line = STYLES[strengths.index(result.edit.strength) % len(STYLES)]
                _line(axes, result, rule, line, APART * (i - (len(here) - 1) / 2))
            axes.axhline(0, color="black", lw=0.6)
            axes.set_xlim(0, 1.03)
            axes.set_xlabel("rate (share of the dimensions masked)")
            axes.set_title(plain(_named(chosen)), loc="left")
        better = "higher" if first.higher_is_better else "lower"
        panels[0].set_ylabel(f"change, {first.unit}\n({better} is better)")
        for i, rule in enumerate(rules):
            panels[0].plot([], [], f"C{i}", marker=GRID_MARKERS[i % len(GRID_MARKERS)], label=rule)
        for i, strength in enumerate(strengths):
            line = STYLES[i % len(STYLES)]
            panels[0].plot([], [], "black", ls=line, label=f"strength {strength:g}")
        shared_legend(made, panels[0], columns=7)
        made.suptitle(
            plain(
                f"{first.run.subject}, {first.task}, {first.n} items, {first.base.value:.4g} "
                f"{first.unit} without an edit; {_bars([c for r in results for c in r.conditions])}"
            ),
            fontsize=8,
        )
    return made


def _check_same(results: Sequence[Evaluation]) -> None:
    if not results:
        raise ResultError("there is no evaluation to draw.")
    for what, values in (
        ("tasks", {r.task for r in results}),
        ("models", {r.run.weights for r in results}),
        ("sets of items", {(r.n, r.weight, r.base.value) for r in results}),
        ("kinds of edit", {r.edit.name for r in results}),
    ):
        if len(values) > 1:
            raise ResultError(f"these evaluations are of {len(values)} {what}; draw them apart.")


def _line(axes: Axes, result: Evaluation, rule: int, line: str, aside: float) -> None:
    doses = sorted((result.edited, *result.dose), key=lambda c: c.edit.rate)
    rates, colour = [c.edit.rate + aside for c in doses], f"C{rule}"
    axes.plot(
        rates,
        [_delta(c) for c in doses],
        color=colour,
        ls=line,
        marker=GRID_MARKERS[rule % len(GRID_MARKERS)],
    )
    for x, c in zip(rates, doses, strict=True):
        if c.delta is not None and c.delta.interval is not None:
            axes.vlines(x, *c.delta.interval, color=colour, lw=0.8, alpha=0.7)


def _named(layers: str | tuple[int, ...]) -> str:
    if isinstance(layers, str):
        return {"after": "all layers after the ME Layer", "next": "the next layer alone"}[layers]
    return f"layers {', '.join(map(str, layers))} (from 0)"
