"""Several models in one figure: a line a model over layers, or a point with its interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from melens.errors import ResultError
from melens.figures.draw import (
    LAYER_LABEL,
    PAGE,
    Into,
    drawn_into,
    legend_below,
    named,
    panel,
    plain,
)
from melens.figures.profile import gaps
from melens.formatting import brief
from melens.results.base import Result, run_of
from melens.results.collapse import Collapse
from melens.results.describe import TokenPortrait
from melens.results.evaluation import Evaluation
from melens.results.locate import MELayer
from melens.results.metric import MetricProfile
from melens.results.scan import WeightScan
from melens.results.sinks import Sinks

R = TypeVar("R", bound=Result)
Curve = Sequence[float | None]
LINES = ("-", ":", "-.")
"""From one to the next where the ten colours begin again; dashes have a meaning of their own."""
DEPTH_LABEL = "share of the blocks passed (block outputs)"


@dataclass(frozen=True)
class LayerCurve(Generic[R]):
    """What a kind of result shows of a model, layer by layer."""

    label: Callable[[R], str]
    values: Callable[[R], Curve]
    without: Callable[[R], Curve] | None = None
    """The same without the massive token, dashed."""
    marked: Callable[[R], int | None] = lambda result: getattr(result, "me_layer", None)
    """A layer that gets a large marker."""
    log: bool = False


COMPARED: dict[type[Result], LayerCurve[Any]] = {
    MELayer: LayerCurve[MELayer](
        lambda _: "largest |x| (residual units)", lambda r: [row.max for row in r.profile], log=True
    ),
    TokenPortrait: LayerCurve[TokenPortrait](
        lambda _: "token's energy in its top coordinate",
        lambda r: r.energy_layers["1"] if r.energy_layers else [],
    ),
    Collapse: LayerCurve[Collapse](
        lambda _: "effective rank of keys, heads averaged",
        lambda r: r.curve("k")[0],
        lambda r: r.curve("k")[1] if r.sequences_massive else [],
    ),
    Sinks: LayerCurve[Sinks](
        lambda r: f"sink rate of the first token (eps {r.shown_eps})",
        lambda r: r.sink_rate[r.shown_eps],
    ),
    WeightScan: LayerCurve[WeightScan](
        lambda _: "ceiling of the highest neuron (residual units)",
        lambda r: [row.ceiling for row in r.profile],
        log=True,
    ),
    MetricProfile: LayerCurve[MetricProfile](
        lambda r: f"{r.metric} ({r.unit}), mean of sequences",
        lambda r: [row.mean for row in r.profile],
        marked=lambda _: None,
    ),
}


@overload
def compare(
    results: Result | Sequence[Result],
    *,
    names: Sequence[str] | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure: ...
@overload
def compare(
    results: Result | Sequence[Result], *, names: Sequence[str] | None = None, ax: Axes
) -> Axes: ...
def compare(
    results: Result | Sequence[Result],
    *,
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure | Axes:
    """Draw results of one kind, of several models or of one, into one panel.

    Locate, describe, collapse, sinks, scan and metric results give one line a model over layers;
    evaluations of one unit give one point an evaluation, with its paired 95 % interval. Models of
    different depth are drawn over the share of their blocks.

    Args:    results: of one kind. names: one a result; None = the models' names.
             ax, figure: where to draw, with your own matplotlib settings; None = a new figure.
    Returns: the new figure; what it was drawn into: the ax, or the whole figure.
    Raises:  ResultError: none, several kinds, a kind that has no such figure, other metrics or
             units, or other names than one a result.
    """
    given = [results] if isinstance(results, Result) else list(results)
    shown = _checked(given, names)
    drawer: Callable[..., Figure] = _forest if isinstance(given[0], Evaluation) else _lines
    return drawn_into(lambda into: drawer(given, shown, into), ax, figure)


def _checked(results: Sequence[Result], names: Sequence[str] | None) -> list[str]:
    """The name of each result; refuses what cannot stand in one figure."""
    if not results:
        raise ResultError("compare got no results; give a list of them.")
    kinds = list(dict.fromkeys(type(result) for result in results))
    if not all(issubclass(kind, Result) for kind in kinds):
        said = ", ".join(kind.__name__ for kind in kinds)
        raise ResultError(
            f"compare takes results, got {said}; read saved ones with "
            "melens.results.load_result(path)."
        )
    if len(kinds) > 1:
        said = ", ".join(kind.__name__ for kind in kinds)
        raise ResultError(f"compare takes results of one kind, got {said}; draw each by itself.")
    if kinds[0] not in COMPARED and kinds[0] is not Evaluation:
        fits = ", ".join(kind.__name__ for kind in (*COMPARED, Evaluation))
        raise ResultError(f"no figure compares {kinds[0].__name__}; it can be of {fits}.")
    labels = {_label(result) for result in results}
    if len(labels) > 1:
        raise ResultError(
            f"these results are of {len(labels)} units or metrics ({', '.join(sorted(labels))}); "
            "draw each in a figure of its own."
        )
    return _names(results) if names is None else _given_names(names, len(results))


def _given_names(names: Sequence[str], count: int) -> list[str]:
    fits = not isinstance(names, str) and len(names) == count
    if not fits or not all(isinstance(name, str) and name.strip() for name in names):
        raise ResultError(
            f"names must be a list of {count} texts, one a result, got {brief(names, 60)}."
        )
    return list(names)


def _shown(name: str) -> str:
    """A name for the legend, which leaves out what begins with an underscore."""
    text = named(name)
    return f" {text}" if text.startswith("_") else text


def _label(result: Result) -> str:
    """What is drawn of a result, with its unit."""
    return result.unit if isinstance(result, Evaluation) else COMPARED[type(result)].label(result)


def _names(results: Sequence[Result]) -> list[str]:
    """Models by name; what tells equal names apart is added, and a number where nothing does.

    Evaluations have their task and edit beside the name.
    """
    runs = [run for run in map(run_of, results) if run is not None]  # each of these has one
    if isinstance(results[0], Evaluation):
        return [run.model for run in runs]
    for parts in (
        lambda run: (run.model,),
        lambda run: (run.subject,),
        lambda run: (run.subject, run.dtype),
        lambda run: (run.subject, run.dtype, str(run.model_revision or run.weights)[:8]),
    ):
        made = [", ".join(parts(run)) for run in runs]
        if len(set(made)) == len(made):
            return made
    return [f"{i}: {name}" for i, name in enumerate(made, start=1)]


def _lines(results: Sequence[Result], names: Sequence[str], into: Into) -> Figure:
    made, axes = panel(into, PAGE, 2.7 + 0.12 * len(results))
    what = COMPARED[type(results[0])]
    curves = [what.values(result) for result in results]
    same_depth = len({len(curve) for curve in curves if curve}) == 1  # none without a token
    for i, (result, name, curve) in enumerate(zip(results, names, curves, strict=True)):
        depth = 1 if same_depth else len(curve)
        places = [(layer + (not same_depth)) / depth for layer in range(len(curve))]
        colour = f"C{i}"
        axes.plot(
            places,
            gaps(tuple(curve)),
            color=colour,
            label=_shown(name),
            ls=LINES[i // 10 % len(LINES)],
        )
        if what.without is not None and (left := what.without(result)):
            axes.plot(places, gaps(tuple(left)), color=colour, ls="--", marker="")
        layer = what.marked(result)
        height = curve[layer] if layer is not None and 0 <= layer < len(curve) else None
        if layer is not None and height is not None:
            axes.plot(places[layer], height, marker="o", color=colour, ms=6, ls="")
    if any(what.marked(result) is not None for result in results):
        axes.plot([], [], marker="o", color="black", ms=6, ls="", label="ME Layer")
    if what.without is not None:
        axes.plot([], [], color="black", ls="--", label="without the massive token")
    if what.log:
        axes.set_yscale("log")
    axes.set_ylabel(what.label(results[0]))
    axes.set_xlabel(LAYER_LABEL if same_depth else DEPTH_LABEL)
    if same_depth:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(made, axes, into, columns=3)
    return made


def _forest(results: Sequence[Evaluation], names: Sequence[str], into: Into) -> Figure:
    made, axes = panel(into, PAGE, 1.0 + 0.3 * len(results))
    for y, result in enumerate(results):
        if result.delta.interval is not None:
            axes.plot(result.delta.interval, [y, y], color="C0", lw=1.2, marker="")
        axes.plot(result.delta.value, y, marker="o", color="C0", ls="")
    said = [
        f"{_shown(n)}\n{plain(f'{r.task}: {r.edit.label}')}"
        for n, r in zip(names, results, strict=True)
    ]
    axes.set_yticks(range(len(results)), said, fontsize=6.5)
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.axvline(0, color="black", lw=0.6)
    better = {True: "higher", False: "lower"}
    directions = {better[result.higher_is_better] for result in results}
    axes.set_xlabel(
        f"edited - unedited, {results[0].unit}"
        + (f" ({directions.pop()} is better)" if len(directions) == 1 else "")
    )
    return made
