"""Quantisation: what each scheme costs, as it is, protected and with random controls."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from melens.figures.draw import ME_COLOUR, PAGE, Into, figure, plain, shared_legend, sheet
from melens.results.quantise import Quantisation, QuantisedTrial

COLOURS = {"as is": "black", "protected": ME_COLOUR, "control": "#777777"}
MARKERS = {"as is": "o", "protected": "D", "control": "s"}
SHOWN = {"as is": "as is", "protected": "kept whole", "control": "as many at random"}
LINE, HEAD = 0.17, 1.2
"""Inches of a row, and of what is around them."""


@figure(Quantisation, "quantise")
def draw_quantised(result: Quantisation, into: Into = None) -> Figure:
    """Nats a token over the model as it is; a row for each thing kept whole, a block a scheme."""
    rows = sum(len(found.trials) + 1 for found in result.schemes)
    made = sheet(into, PAGE, HEAD + LINE * rows)
    axes = made.subplots()
    ticks, names, y = [], [], 0.0
    for found in result.schemes:
        for trial in found.trials:
            _point(axes, trial, y)
            ticks.append(y)
            names.append(found.scheme if trial.role == "as is" else _name(trial))
            y += 1
        y += 1
    axes.axvline(0, color="black", lw=0.6)
    axes.set_yticks(ticks, [plain(name) for name in names], fontsize=6)
    axes.set_ylim(y - 1, -1)
    axes.set_xlabel(
        "cost (nats a token over the model as it is, linear up to 0.1; 95 % intervals over texts)"
    )
    axes.set_xscale("symlog", linthresh=0.1)
    shown = {trial.role for found in result.schemes for trial in found.trials}
    for role, label in SHOWN.items():
        if role in shown:
            axes.plot([], [], MARKERS[role], color=COLOURS[role], ms=4, label=label)
    shared_legend(made, axes, columns=3)
    made.suptitle(plain(f"{result.run.model}: cost of number formats"), fontsize=8)
    return made


def _name(trial: QuantisedTrial) -> str:
    if trial.seed is None:
        return trial.name
    return f"{trial.name} (as many as {trial.control_of}), seed {trial.seed}"


def _point(axes: Axes, trial: QuantisedTrial, y: float) -> None:
    colour = COLOURS[trial.role]
    if trial.damage.interval is not None:
        axes.hlines(y, *trial.damage.interval, color=colour, lw=1.0)
    axes.plot(trial.damage.value, y, MARKERS[trial.role], color=colour, ms=3.5)
