"""MetricProfile: one registered metric of the residual, layer by layer. Layers count from 0."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from melens.protocols import JsonObject
from melens.provenance import RunInfo
from melens.results.base import Part, Result


class MetricRow(Part):
    """One layer's output."""

    layer: int
    mean: float
    """Over the sequences."""
    values: tuple[float, ...]
    """One a sequence, in the order of the texts."""


class MetricProfile(Result):
    """A metric of every sequence's residual, at every layer."""

    schema_id: ClassVar[str] = "melens/metric/1"

    kind: Literal["metric"] = "metric"
    schema_: Literal["melens/metric/1"] = Field(default="melens/metric/1", alias="schema")
    metric: str
    unit: str
    sequences: int
    profile: tuple[MetricRow, ...]
    run: RunInfo

    @model_validator(mode="after")
    def _fits_together(self) -> MetricProfile:
        """Refuse what no run can have made."""
        if [row.layer for row in self.profile] != list(range(len(self.profile))):
            raise ValueError("profile must have one row a layer, counted from 0")
        if not self.profile or {len(row.values) for row in self.profile} != {self.sequences}:
            raise ValueError("every layer must have one value a sequence")
        return self

    def rows(self) -> list[JsonObject]:
        """One row a layer, without the single values."""
        return [
            {
                "layer": row.layer,
                "mean": row.mean,
                "least": min(row.values),
                "largest": max(row.values),
            }
            for row in self.profile
        ]

    def summary(self) -> str:
        """One plain sentence; layers count from 0 at the block output."""
        low = min(self.profile, key=lambda row: row.mean)
        high = max(self.profile, key=lambda row: row.mean)
        return (
            f"{self.run.subject}: {self.metric} ({self.unit}) of the residual runs from "
            f"{low.mean:,.4g} at layer {low.layer} to {high.mean:,.4g} at layer {high.layer} "
            f"(counted from 0, at the block output; mean of {self.sequences} sequences)."
        )
