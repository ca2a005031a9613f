"""Reach: how far chosen first tokens really go. Layers count from 0, block outputs."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from melens.protocols import JsonObject
from melens.provenance import RunInfo
from melens.results.base import Part, Result
from melens.results.scan import Why


class ReachToken(Part):
    """One token, alone at position 0."""

    token_id: int
    token: str
    why: Why
    value: float
    """Its largest entry at any layer's output, signed."""
    layer: int
    """Where that is."""
    dim: int
    largest: tuple[float, ...]
    """Largest |x| at the output of each layer that was run."""
    dims: tuple[int, ...]
    """The dimension of each."""


class ReachRow(Part):
    """One layer, over all tokens."""

    layer: int
    value: float
    """The largest entry of the layer's output, signed."""
    dim: int
    token_id: int
    write: float | None
    """The largest entry that the FFN adds, after any norm behind it, signed; None without one."""
    write_dim: int | None
    write_token_id: int | None
    ceiling: float | None
    """The scan's bound on what one neuron can write into one coordinate; None without a scan."""
    ceiling_dim: int | None
    used: float | None
    """Largest |FFN write| in that coordinate over the ceiling. All neurons write together, so it
    can pass 1.
    """


class Reach(Result):
    """The exact first-token trajectories of some tokens, from one pass over the weights."""

    schema_id: ClassVar[str] = "melens/reach/1"

    kind: Literal["reach"] = "reach"
    schema_: Literal["melens/reach/1"] = Field(default="melens/reach/1", alias="schema")
    n_layers: int
    until: int
    """The last layer that was run."""
    tokens: tuple[ReachToken, ...]
    profile: tuple[ReachRow, ...]
    run: RunInfo

    @model_validator(mode="after")
    def _fits_together(self) -> Reach:
        """Refuse what no run can have made."""
        layers = list(range(self.until + 1))
        if not self.tokens or not 0 <= self.until < self.n_layers:
            raise ValueError("there must be a token, and until must be a layer of the model")
        if [row.layer for row in self.profile] != layers:
            raise ValueError("profile must have one row a layer, from 0 to until")
        lengths = {len(part) for token in self.tokens for part in (token.largest, token.dims)}
        if lengths != {len(layers)}:
            raise ValueError("every token must have one value and one dimension a layer")
        if len({token.token_id for token in self.tokens}) != len(self.tokens):
            raise ValueError("tokens must differ")
        return self

    def rows(self) -> list[JsonObject]:
        """One row a layer."""
        return [row.model_dump() for row in self.profile]

    def summary(self) -> str:
        """Plain sentences; layers count from 0 at the block output."""
        far = max(self.tokens, key=lambda token: abs(token.value))
        text = (
            f"{self.run.subject}: of {len(self.tokens)} first tokens {far.token!r} goes farthest, "
            f"to {far.value:,.0f} in dimension {far.dim} at layer {far.layer} of {self.n_layers} "
            "(counted from 0, at the block output)"
        )
        if self.until < self.n_layers - 1:
            text += f"; the layers after {self.until} were not run"
        best = max(
            (row for row in self.profile if row.used is not None),
            default=None,
            key=lambda row: row.used or 0.0,
        )
        if best is not None:
            text += f"; most of a ceiling is used at layer {best.layer}: {best.used:.2g} of it"
        return f"{text}."
