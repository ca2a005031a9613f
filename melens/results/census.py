"""Census: every model of a machine, its ME Layer, and what was published about it."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from melens.formatting import counted
from melens.protocols import JsonObject
from melens.provenance import RunInfo
from melens.results.base import Part, Result
from melens.results.locate import Verdict

Kind = Literal["named", "folder", "gguf", "hub"]
SHOWN = (
    "name",
    "family",
    "parameters",
    "n_layers",
    "me_layer",
    "depth",
    "verdict",
    "dims",
    "largest",
    "sink_rate",
    "published",
    "match",
)


class CensusRow(Part):
    """One model. Layers count from 0, at the block output; sizes are residual units."""

    name: str
    kind: Kind
    files: str | None
    """Short hash of what the weight files are; None where they could not be opened."""
    family: str | None = None
    """``model_type`` of the config, or a GGUF's architecture."""
    parameters: int | None = Field(default=None, ge=0)
    """Stored values; those of a packed format count as they are packed."""
    n_layers: int | None = None
    d_model: int | None = None
    how: Literal["located", "predicted"] | None = None
    """Whether the ME Layer was found by running the model, or predicted from its weights."""
    me_layer: int | None = None
    predicted: int | None = None
    """The ME Layer that the scan predicts, beside a located one."""
    verdict: Verdict | None = None
    """Of a located ME Layer; a scan has none."""
    dims: tuple[int, ...] = ()
    """Massive dimensions, or those that the prediction is about."""
    largest: float | None = None
    """Largest massive |x|: located, or what first tokens of the scan reach; None = not run."""
    confidence: float | None = None
    sink_rate: float | None = None
    """Gu et al.'s Sink of the first token at eps 0.3, T = 64; None where it was not measured."""
    published: str | None = None
    """Published ME Layers of the same model; None where nothing is on record."""
    match: Literal["match", "mismatch", "unknown"] | None = None
    """Against the published record."""
    off: str | None = None
    """What does not fit, and by how much."""
    note: str | None = None
    """What could not be measured, and why."""
    error: str | None = None
    """Why there are no numbers."""

    @model_validator(mode="after")
    def _fits_together(self) -> CensusRow:
        layers, dims = self.n_layers or 0, self.d_model or 0
        if self.error is not None:
            if self.how is not None or self.me_layer is not None:
                raise ValueError("a model with an error has no numbers")
            return self
        if self.how is None or layers < 1 or dims < 1:
            raise ValueError("a model without an error has layers, a width and an answer")
        if any(x is not None and not -1 <= x < layers for x in (self.me_layer, self.predicted)):
            raise ValueError(f"layers must be within -1 and {layers - 1}")
        if any(not 0 <= dim < dims for dim in self.dims):
            raise ValueError(f"dimensions must be within 0 and {dims - 1}")
        return self

    @property
    def depth(self) -> float | None:
        """Relative depth of the ME Layer: layer / (n_layers - 1), 0 = the first, 1 = the last."""
        if self.me_layer is None or self.n_layers is None or self.n_layers < 2:
            return None
        return self.me_layer / (self.n_layers - 1)


class Census(Result):
    """Every model that was found, and its ME Layer."""

    schema_id: ClassVar[str] = "melens/census/1"

    kind: Literal["census"] = "census"
    schema_: Literal["melens/census/1"] = Field(default="melens/census/1", alias="schema")
    asked: tuple[str, ...]
    """Folders, files and ids that were given; () = what this machine's caches hold."""
    models: tuple[CensusRow, ...]
    run: RunInfo

    @model_validator(mode="after")
    def _each_once(self) -> Census:
        if not self.models:
            raise ValueError("a census has a model")
        if doubled := [name for name, n in Counter(m.name for m in self.models).items() if n > 1]:
            raise ValueError(f"{doubled[0]} comes twice")
        return self

    def rows(self) -> list[JsonObject]:
        """One row a model, with its relative depth."""
        return [row.model_dump() | {"depth": row.depth} for row in self.models]

    def shown(self) -> list[JsonObject]:
        """The main columns."""
        return [{key: row[key] for key in SHOWN} for row in self.rows()]

    @property
    def failed(self) -> tuple[CensusRow, ...]:
        """Models without numbers."""
        return tuple(row for row in self.models if row.error is not None)

    def summary(self) -> str:
        """Plain sentences; layers count from 0."""
        n, failed = len(self.models), len(self.failed)
        how = Counter(row.how for row in self.models)
        text = f"{counted(n, 'model')}: {how['located']} located, "
        text += f"{how['predicted']} predicted from the weights, {failed} failed"
        depths = [row.depth for row in self.models if row.depth is not None]
        if depths:
            ends = dict.fromkeys(f"{depth:.2f}" for depth in (min(depths), max(depths)))
            text += f"; {len(depths)} with an ME Layer, at a relative depth of "
            text += f"{' to '.join(ends)} (0 = the first layer, 1 = the last)"
        held = Counter(row.match for row in self.models if row.published is not None)
        if held:
            text += (
                f"; of {sum(held.values())} on record {held['match']} match, {held['mismatch']} do "
                f"not, {held['unknown']} cannot be told"
            )
        return f"{text}."
