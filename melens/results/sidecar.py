"""Sidecar: what other tools need to know of a model's massive activations, in one small file."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from melens.formatting import counted
from melens.protocols import JsonObject
from melens.provenance import RunInfo
from melens.results.base import Part, Result, added_later


class SidecarLayer(Part):
    """One layer's output; numbers are in residual units, of the reference texts."""

    layer: int
    """From 0; -1 is the embedding."""
    coordinate: float | None
    """A token is massive here where |x[dim]| is above this; None where no threshold tells massive
    tokens from others (before the ME Layer, and where they are erased)."""
    norm: float
    """The least norm of such a token."""
    dims: tuple[int, ...]
    """Dimensions in which massive tokens are massive here, the largest first."""
    values: tuple[float, ...]
    """Their signed median over massive tokens."""
    clip: float
    """The 0.999 quantile of |x| over the other tokens in these dimensions (in ``dim``, where there
    are none): the smallest value with that share at or below it."""
    told: float | None
    """Share of the reference tokens of which the threshold says the same as the ME Layer's rule; 1
    after the ME Layer, since the threshold was chosen on them."""


class OutlierDimension(Part):
    """A dimension that is large on nearly all tokens: a residual sink, not a massive activation."""

    dim: int
    first_layer: int
    """The first of the layers at whose output it is one."""
    layers: int
    """At how many layers' outputs it is one."""
    ratio: float
    """Median |x| over tokens, by that of all dimensions; the largest over these layers."""


class Protected(Part):
    """A neuron, and the single weight through which it writes: keep both in high precision."""

    layer: int
    neuron: int
    dim: int
    """``down_proj.weight[dim, neuron]`` is the weight."""
    expert: str | None
    why: Literal["emerge", "erase", "super weight"]
    source: Literal["scan", "super-weights"]
    """What found it: the weights alone, or a search that measured the damage."""


class Sidecar(Result):
    """Where massive activations are in a model, for quantisers, servers and trainers."""

    schema_id: ClassVar[str] = "melens/sidecar/1"

    kind: Literal["sidecar"] = "sidecar"
    schema_: Literal["melens/sidecar/1"] = Field(default="melens/sidecar/1", alias="schema")
    model: str
    revision: str | None
    weights: str | None
    """Short hash over a fixed sample of every parameter."""
    n_layers: int
    d_model: int
    me_layer: int
    peak_layer: int | None
    erase_layer: int | None
    dim: int
    """The primary dimension, in which tokens are told."""
    first_ids: tuple[int, ...]
    """Ids of first tokens that are massive; with ``other_first_tokens`` those that are not."""
    other_first_tokens: bool
    """Whether first tokens of other ids are massive too."""
    anywhere_ids: tuple[int, ...]
    """Ids that were massive at later positions; not at all of them, so a hint only."""
    layers: tuple[SidecarLayer, ...]
    outlier_dimensions: tuple[OutlierDimension, ...]
    protected: tuple[Protected, ...]
    experts: tuple[str, ...]
    """Experts that hold a protected neuron: keep them when pruning."""
    tokens: int
    """Reference tokens."""
    massive_tokens: int
    """Of them."""
    sampled_tokens: int | None = added_later()
    """Ordinary tokens that ``clip`` and all medians are of, where these are not of all: drawn from
    many texts to bound memory. Thresholds and ``told`` are of all."""
    run: RunInfo

    def rows(self) -> list[JsonObject]:
        """One row a layer."""
        return [row.model_dump() for row in self.layers]

    def summary(self) -> str:
        """One plain sentence."""
        told = [row.layer for row in self.layers if row.coordinate is not None and row.told == 1]
        span = f"layers {told[0]} to {told[-1]}" if told else "no layer"
        outliers = len(self.outlier_dimensions)
        return (
            f"{self.model}: massive tokens ({self.massive_tokens} of {self.tokens} here) are told "
            f"by dimension {self.dim} at {len(told)} layers ({span}, counted from 0 at the block "
            f"output), as at ME Layer {self.me_layer}; {len(self.protected)} protected weights, "
            f"{counted(outliers, 'dimension')} large on nearly all tokens."
        )
