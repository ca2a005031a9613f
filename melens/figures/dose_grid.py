"""Several evaluations of one task together: a mask's rule, layers and strength by its rate."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from melens.errors import ResultError
from melens.figures.styles import PAGE, Drawing, house_style, plain
from melens.results.evaluation import ConditionScore, Evaluation

STYLES = ("-", "--", ":", "-.")
APART = 0.006
"""Rates by which lines stand beside each other, so that no interval hides another."""
MARKERS = ("o", "s", "^", "v", "D", "P")


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
        made = Drawing(figsize=(PAGE, 3.2), layout="constrained")
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
            panels[0].plot([], [], f"C{i}", marker=MARKERS[i % len(MARKERS)], label=rule)
        for i, strength in enumerate(strengths):
            line = STYLES[i % len(STYLES)]
            panels[0].plot([], [], "black", ls=line, label=f"strength {strength:g}")
        made.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
        made.suptitle(
            plain(f"{first.run.subject}, {first.task}, {first.n} items, {first.base.value:.4g} "
                  f"{first.unit} without an edit; bars: 95 % over items, paired"), fontsize=8,
        )  # fmt: skip
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
    axes.plot(rates, [_delta(c) for c in doses], color=colour, ls=line,
              marker=MARKERS[rule % len(MARKERS)])  # fmt: skip
    for x, c in zip(rates, doses, strict=True):
        if c.delta is not None and c.delta.interval is not None:
            axes.vlines(x, *c.delta.interval, color=colour, lw=0.8, alpha=0.7)


def _delta(condition: ConditionScore) -> float:
    return condition.delta.value if condition.delta else 0.0


def _named(layers: str | tuple[int, ...]) -> str:
    if isinstance(layers, str):
        return {"after": "all layers after the ME Layer", "next": "the next layer alone"}[layers]
    return f"layers {', '.join(map(str, layers))} (from 0)"
