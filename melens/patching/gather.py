"""From finished cells to the grid that is returned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from melens.inputs import Inputs
from melens.patching.choices import Sweep, columns_of
from melens.patching.metrics import PatchMetric
from melens.patching.sites import Place
from melens.patching.waves import Cell
from melens.results.patch import Axis, Nested


def fields_of(
    choice: Sweep,
    metric: PatchMetric,
    places: Mapping[str, Sequence[Place]],
    inputs: Sequence[Inputs],
    cells: Sequence[Cell],
    done: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """A PatchGrid's fields but for the unpatched values and the record of the run.

    Args:    inputs: the clean run's and the corrupted one's.
             done: values of every cell, one a sequence.
    """
    axes = {site: _axes(choice, site, found, inputs) for site, found in places.items()}
    at = {(c.place.site, c.place.layer, c.position, c.head): done[c.key] for c in cells}
    rows = inputs[0].total

    def values(row: int | None) -> dict[str, Nested]:
        return {site: _nest(site, shape, at, row) for site, shape in axes.items()}

    return {
        "mode": choice.mode,
        "metric": metric.name,
        "metric_about": metric.about,
        "sites": tuple(places),
        "axes": axes,
        "values": values(None),
        "sequences": rows,
        "by_sequence": tuple(values(row) for row in range(rows)) if rows > 1 else (),
    }


def _axes(
    choice: Sweep, site: str, places: Sequence[Place], inputs: Sequence[Inputs]
) -> tuple[Axis, ...]:
    layers = tuple(place.layer for place in places)
    heads = tuple(range(places[0].heads or 0))
    made = {
        "layer": Axis(name="layer", index=layers, label=tuple(map(str, layers))),
        "position": Axis(
            name="position",
            index=columns_of(choice, inputs[0].batches[0]),
            label=_tokens(choice, inputs),
        ),
        "head": Axis(name="head", index=heads, label=tuple(map(str, heads))),
    }
    return tuple(made[name] for name in choice.axes(site))


def _tokens(choice: Sweep, inputs: Sequence[Inputs]) -> tuple[str, ...]:
    """Of the first sequence that has the position; both where clean and corrupted differ, clean
    first; dots where other sequences hold another token.
    """  # noqa: D205
    columns = columns_of(choice, inputs[0].batches[0])
    clean, corrupted = ([_token(found, column) for column in columns] for found in inputs)
    return tuple(a if a == b else f"{a} | {b}" for a, b in zip(clean, corrupted, strict=True))


def _token(found: Inputs, column: int) -> str:
    batch = found.batches[0]
    here = batch.ids[:, column][batch.mask[:, column]].tolist()
    return found.decode(here[0]) + (" ..." if len(set(here)) > 1 else "")


def _nest(
    site: str,
    axes: Sequence[Axis],
    at: Mapping[tuple[str, int, int | None, int | None], Sequence[float]],
    row: int | None,
) -> Any:
    names = [axis.name for axis in axes]

    def value(chosen: Mapping[str, int]) -> float:
        found = at[(site, chosen["layer"], chosen.get("position"), chosen.get("head"))]
        return float(math.fsum(found) / len(found)) if row is None else float(found[row])

    def nest(chosen: dict[str, int], depth: int) -> Any:
        if depth == len(axes):
            return value(chosen)
        return tuple(nest({**chosen, names[depth]: i}, depth + 1) for i in axes[depth].index)

    return nest({}, 0)
