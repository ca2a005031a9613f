"""WeightScan: what the weights alone say of where a massive activation is made and erased.

Layers count from 0, at the block output. A dim is a coordinate of the residual stream and the row
of a down projection, a neuron its column: ``down_proj.weight[dim, neuron]`` is the entry that
writes it, a candidate super weight.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from melens.protocols import JsonObject
from melens.provenance import RunInfo
from melens.results.base import Part, Result

Role = Literal["emerge", "erase", "other"]
Sign = Literal[-1, 1]
Path = Literal["gated", "plain", "after a norm"]


class Needs(Part):
    """The normalised input at which a neuron is at its ceiling, its largest coordinates."""

    dims: tuple[int, ...]
    weights: tuple[float, ...]
    """Of the unit vector; the norm's output has length sqrt(d_model)."""
    share: float
    """Of the unit vector's square that these coordinates hold."""


class Candidate(Part):
    """A neuron that stands out among those of its layer, by what it could write."""

    layer: int
    neuron: int
    expert: str | None = None
    """Which expert's neuron it is; None where every token goes through the same FFN."""
    dim: int
    """The residual coordinate that it can move most."""
    ceiling: float
    """The most it can write there, residual units."""
    against: float
    """The most it can write there with the other sign."""
    ratio_to_median: float
    """Ceiling over that of its layer's median neuron."""
    cosine: float | None
    """Between gate and up row, the norm's gain included; None where there is no gate."""
    sign: Sign
    """Of the write at the ceiling."""
    value: float
    """Its down entry, W_down[dim, neuron]."""
    role: Role = "other"
    needs: Needs

    @property
    def at(self) -> tuple[int, int, int]:
        """Layer, row and column of the entry: the coordinates of a super weight."""
        return (self.layer, self.dim, self.neuron)


class LayerCeiling(Part):
    """A layer's loudest neuron, or why nothing is said of it."""

    layer: int
    covered: bool
    reason: str | None = None
    path: Path | None = None
    """Which bound it is."""
    neurons: int = 0
    median: float | None = None
    """Ceiling of the median neuron, of those in the layer that can write at all."""
    ceiling: float | None = None
    ratio_to_median: float | None = None
    neuron: int | None = None
    expert: str | None = None
    dim: int | None = None
    sign: Sign | None = None
    whole: float | None = None
    """Where a norm follows the FFN: the most that the whole FFN can write into any coordinate."""
    whole_dim: int | None = None

    @model_validator(mode="after")
    def _said_or_not(self) -> LayerCeiling:
        numbers = (
            self.path,
            self.median,
            self.ceiling,
            self.ratio_to_median,
            self.neuron,
            self.dim,
            self.sign,
        )
        if any((value is None) == self.covered for value in (*numbers,)):
            raise ValueError("a covered layer has every number, another has none")
        if (self.reason is None) != self.covered:
            raise ValueError("a layer that is not covered says why")
        return self


class WeightScan(Result):
    """Ceilings by layer, and the emergence and erase layers that they predict."""

    schema_id: ClassVar[str] = "melens/scan/1"

    kind: Literal["scan"] = "scan"
    schema_: Literal["melens/scan/1"] = Field(default="melens/scan/1", alias="schema")
    n_layers: int
    d_model: int
    me_layer: int | None
    """Predicted ME Layer; None where the weights predict none."""
    erase_layer: int | None
    dims: tuple[int, ...]
    """Coordinates that the prediction is about, the strongest first."""
    confidence: float = Field(ge=0, le=1)
    """How far the emergence stands out, in [0, 1]; not a probability."""
    rule: str
    """How the prediction was made, with its constants."""
    candidates: tuple[Candidate, ...]
    profile: tuple[LayerCeiling, ...]
    covered: bool
    """Whether every layer's FFN has a bound here."""
    leaves_out: tuple[str, ...]
    """What can write into the residual and has no bound here."""
    run: RunInfo

    @model_validator(mode="after")
    def _fits_together(self) -> WeightScan:
        """Refuse what no scan can have made; figures and sentences rely on it."""
        if [row.layer for row in self.profile] != list(range(self.n_layers)) or not self.profile:
            raise ValueError("profile must have one row a layer, counted from 0")
        if self.covered != all(row.covered for row in self.profile):
            raise ValueError("covered must be what the profile says")
        layers = (self.me_layer, self.erase_layer)
        if any(layer is not None and not 0 <= layer < self.n_layers for layer in layers):
            raise ValueError(f"layers must be within 0 and {self.n_layers - 1}")
        if (self.me_layer is None) == bool(self.dims):
            raise ValueError("a predicted ME Layer comes with its dimensions")
        if self.erase_layer is not None and (
            self.me_layer is None or self.erase_layer <= self.me_layer
        ):
            raise ValueError("the erase layer comes after an ME Layer")
        if any(
            not 0 <= c.layer < self.n_layers or not 0 <= c.dim < self.d_model
            for c in self.candidates
        ):
            raise ValueError("candidates must lie inside the model")
        return self

    def rows(self) -> list[JsonObject]:
        """One row a layer."""
        return [row.model_dump() for row in self.profile]

    def shown(self) -> list[JsonObject]:
        """The main columns."""
        keep = ("layer", "ceiling", "ratio_to_median", "neuron", "expert", "dim", "sign", "reason")
        return [{key: row[key] for key in keep} for row in self.rows()]

    def summary(self) -> str:
        """Plain sentences; layers count from 0."""
        ends = " Nothing was run: a ceiling says what can happen, not what does."
        if self.me_layer is None:
            if not any(row.covered for row in self.profile):
                return f"{self.run.subject}: nothing is said, {self.profile[0].reason}."
            return f"{self.run.subject}: the weights foretell no ME Layer.{ends}"
        text = (
            f"{self.run.subject}: the weights foretell ME Layer {self.me_layer} of "
            f"0..{self.n_layers - 1}, dim {', '.join(map(str, self.dims))}"
        )
        if self.erase_layer is not None:
            text += f", and erasure at layer {self.erase_layer}"
        return f"{text} (layers count from 0; confidence {self.confidence:.2f}).{ends}"
