"""PatchGrid: what every patched run measured, along layer, position and head."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from melens.protocols import JsonObject
from melens.provenance import RunInfo
from melens.results.base import Part, Result

Row = tuple[float, ...]
Plane = tuple[Row, ...]
Nested = Row | Plane | tuple[Plane, ...]
"""One level an axis, one to three axes; the validator holds it against them."""
NOTHING = 1e-6
"""A change below this, relative to the unpatched value, is rounding."""
SHOWN = 60
"""Rows that a notebook or a terminal lists, the strongest first."""


class Axis(Part):
    """One axis of a sweep."""

    name: Literal["layer", "position", "head"]
    index: tuple[int, ...]
    """Layer numbers from 0, columns of the batch, or heads (key-value heads for k and v)."""
    label: tuple[str, ...]
    """Token text of the first sequence at positions, ``clean | corrupted`` where they differ."""


class PatchGrid(Result):
    """The metric of every patched run. Values are means over the batch's sequences."""

    schema_id: ClassVar[str] = "melens/patch/1"

    kind: Literal["patch"] = "patch"
    schema_: Literal["melens/patch/1"] = Field(default="melens/patch/1", alias="schema")
    mode: Literal["denoising", "noising", "mean", "resample"]
    metric: str
    metric_about: str
    """What the metric is, with its unit or direction."""
    sites: tuple[str, ...]
    axes: dict[str, tuple[Axis, ...]]
    """Site -> its axes, outermost first; an axis left out was patched as a whole."""
    values: dict[str, Nested]
    """Site -> nested lists along its axes."""
    by_sequence: tuple[dict[str, Nested], ...] = ()
    """The same for each sequence of the batch; empty with one sequence. A sequence that ends before
    a position counts there as unpatched."""
    clean: float
    """The metric of the unpatched clean run."""
    corrupted: float | None
    """Of the unpatched corrupted run; None under ablation, which has none."""
    sequences: int
    missing: tuple[str, ...] = ()
    """Layers without a site, and why."""
    run: RunInfo

    @model_validator(mode="after")
    def _fits_together(self) -> PatchGrid:
        """Refuse arrays that do not have the shape of their axes."""
        if not self.sites or not set(self.sites) == set(self.axes) == set(self.values):
            raise ValueError("sites, axes and values must name the same sites")
        for axes in self.axes.values():
            if any(len(axis.index) != len(axis.label) or not axis.index for axis in axes):
                raise ValueError("an axis must have one label an index, and at least one")
        for values in (self.values, *self.by_sequence):
            for site, array in values.items():
                _check_shape(array, [len(axis.index) for axis in self.axes[site]])
        if (self.corrupted is None) != (self.mode in ("mean", "resample")):
            raise ValueError("corrupted must be there for a pair, and only for one")
        if len(self.by_sequence) != (self.sequences if self.sequences > 1 else 0):
            raise ValueError("by_sequence must have one entry a sequence, none for a single one")
        return self

    @property
    def baseline(self) -> float:
        """The metric of the run that patches go into: a value equal to it is no effect."""
        if self.mode == "denoising" and self.corrupted is not None:
            return self.corrupted
        return self.clean

    def normalised(self, value: float) -> float | None:
        """(value - corrupted) / (clean - corrupted): 0 = as corrupted, 1 = as clean.

        None under ablation, and where both unpatched runs measure the same.
        """
        if self.corrupted is None or self.clean == self.corrupted:
            return None
        return (value - self.corrupted) / (self.clean - self.corrupted)

    def rows(self) -> list[JsonObject]:
        """One row a cell, in the order of the axes; all sites have all columns."""
        return [
            {"site": site, "layer": None, "position": None, "token": None, "head": None}
            | where
            | {"value": value, "change": value - self.baseline, "effect": self.normalised(value)}
            for site in self.sites
            for where, value in self._cells(site)
        ]

    def grids(self) -> dict[str, Nested]:
        """``values.site``: the metric of each patched run, its shape that of the site's axes."""
        return {f"values.{site}": self.values[site] for site in self.sites}

    def strongest(self) -> list[JsonObject]:
        """The rows by size of their change, largest first."""
        return sorted(self.rows(), key=lambda row: -abs(row["change"]))

    def shown(self, most: int = SHOWN) -> list[JsonObject]:
        """The strongest rows, without the columns that nobody swept."""
        top = self.strongest()[:most]
        empty = {name for name in top[0] if all(row[name] is None for row in top)}
        return [{name: cell for name, cell in row.items() if name not in empty} for row in top]

    def summary(self) -> str:
        """One plain sentence."""
        top = self.strongest()[0]
        if abs(top["change"]) <= NOTHING * max(1.0, abs(self.baseline)):
            return f"{self.run.subject}, {self.mode}: no patched run changes {self.metric}."
        place = f"{top['site']} at layer {top['layer']}"
        if top["position"] is not None:
            place += f", position {top['position']} ({top['token']!r})"
        if top["head"] is not None:
            place += f", head {top['head']}"
        ends = f"clean {self.clean:.4g}"
        ends += "" if self.corrupted is None else f", corrupted {self.corrupted:.4g}"
        text = f"{self.run.subject}, {self.mode}: {self.metric} ({ends}) changes most at {place}"
        text += f" (layers count from 0): {top['value']:.4g}"
        return text + (f", effect {top['effect']:.2f}." if top["effect"] is not None else ".")

    def _cells(self, site: str) -> Iterator[tuple[JsonObject, float]]:
        axes = self.axes[site]
        for at in product(*(range(len(axis.index)) for axis in axes)):
            value: Nested | float = self.values[site]
            where: JsonObject = {}
            for axis, i in zip(axes, at, strict=True):
                assert isinstance(value, tuple)  # _check_shape saw to it
                value = value[i]
                where[axis.name] = axis.index[i]
                if axis.name == "position":
                    where["token"] = axis.label[i]
            assert isinstance(value, float)
            yield where, value


def _check_shape(array: Nested | float, shape: list[int]) -> None:
    if not shape:
        if not isinstance(array, float):
            raise ValueError("values must be floats")
        return
    if not isinstance(array, tuple) or len(array) != shape[0]:
        raise ValueError(f"values must have the shape of their axes, {shape}")
    for part in array:
        _check_shape(part, shape[1:])
