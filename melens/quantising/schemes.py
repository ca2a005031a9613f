"""Number formats that models are served in: what is rounded, how finely, over which scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from melens.registry import Registry

Per = Literal["tensor", "text", "token", "channel", "group"]


@dataclass(frozen=True)
class Grid:
    """Values that something is rounded to, and what shares one scale.

    The scale is the largest |x| over half the range, as in compressed-tensors (symmetric; so 8
    bits step by max / 127.5).
    """

    bits: int
    per: Per
    kind: Literal["int", "float"] = "int"
    """``float`` with 8 bits is FP8 E4M3."""
    static: bool = False
    """Whether the scale comes from other texts beforehand, and larger values are cut."""
    scale: float | None = None
    """A scale that nothing is measured for (1: a plain cast); None = measured."""

    def said(self) -> str:
        """In words."""
        kind = "FP8 E4M3" if self.kind == "float" else f"int{self.bits}"
        if self.scale is not None:
            return f"{kind}, scale {self.scale:g}"
        how = "a static scale" if self.static else "a scale"
        return f"{kind}, {how} per {self.per}"


@dataclass(frozen=True)
class Scheme:
    """What is rounded of a model: weights of linear layers, what these read, the KV cache."""

    name: str
    weights: Grid | str | None = None
    """A GGUF block format by its name."""
    inputs: Grid | None = None
    cache: Grid | None = None
    group: int = 128
    """Weights of one row that share a scale where ``weights`` is per group, and the row divides;
    else the largest of 64 and 32 that divides it."""

    @property
    def static(self) -> bool:
        """Whether other texts have to be run first."""
        return self.inputs is not None and self.inputs.static

    def said(self) -> str:
        """In words."""
        weights = self.weights
        if isinstance(weights, Grid):
            weights = weights.said()
        parts = {
            "weights": weights and f"weights {weights}",
            "inputs": self.inputs and f"inputs of linear layers {self.inputs.said()}",
            "cache": self.cache and f"keys and values {self.cache.said()}",
        }
        return "; ".join(filter(None, parts.values()))


INT8 = Grid(8, "channel")
FP8 = Grid(8, "token", "float")
SCHEMES: Registry[Scheme] = Registry("scheme")
for _scheme in (
    Scheme("w8a8-tensor", INT8, Grid(8, "text")),
    Scheme("w8a8-static", INT8, Grid(8, "tensor", static=True)),
    Scheme("w8a8-token", INT8, Grid(8, "token")),
    Scheme(
        "fp8-static",
        Grid(8, "tensor", "float"),
        Grid(8, "tensor", "float", static=True),
    ),
    Scheme("fp8-token", Grid(8, "channel", "float"), FP8),
    Scheme("w8a16", INT8),
    Scheme("w4a16", Grid(4, "group")),
    Scheme("w4a4", Grid(4, "group"), Grid(4, "token")),
    Scheme("q8_0", "Q8_0"),
    Scheme("q4_0", "Q4_0"),
    Scheme("kv8-token", cache=Grid(8, "token")),
    Scheme("kv8-channel", cache=Grid(8, "channel")),
    Scheme("kv4-token", cache=Grid(4, "token")),
    Scheme("kv4-channel", cache=Grid(4, "channel")),
    Scheme("kv-fp8", cache=Grid(8, "tensor", "float", scale=1.0)),
):
    SCHEMES.add(_scheme.name, _scheme)
DEFAULT = ("w8a8-tensor", "w8a8-static", "w8a8-token", "fp8-static", "w4a16", "q4_0", "kv4-token")
"""One of each kind that engines offer, and the formats in which one scale serves many tokens."""
