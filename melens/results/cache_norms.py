"""CacheNorms: how large massive tokens' keys and values are beside the others'.

Layers and heads count from 0; heads are key-value heads.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from melens.provenance import RunInfo
from melens.results.base import Part, Result


class CacheRow(Part):
    """One site of one layer, in the head where the massive token stands out most."""

    layer: int
    site: Literal["k", "k_norm", "rot_k", "v"]
    """Keys as they are kept where that can be read (after RoPE), else the last site before."""
    head: int
    token: float
    """Largest |entry| of the massive tokens."""
    others: float
    """Median over the other tokens of a token's largest |entry|, averaged over sequences."""
    ratio: float
    """token / others."""


class CacheNorms(Result):
    """Keys and values of massive tokens against those of other tokens, layer by layer."""

    schema_id: ClassVar[str] = "melens/cache-norms/1"

    kind: Literal["cache-norms"] = "cache-norms"
    schema_: Literal["melens/cache-norms/1"] = Field(default="melens/cache-norms/1", alias="schema")
    me_layer: int | None
    n_layers: int
    rows_: tuple[CacheRow, ...] = Field(alias="rows")
    missing: tuple[str, ...]
    """Sites that this model does not show, with the reason."""
    run: RunInfo

    @model_validator(mode="after")
    def _fits_together(self) -> CacheNorms:
        """Refuse what no run can have made."""
        if any(not 0 <= row.layer < self.n_layers or row.head < 0 for row in self.rows_):
            raise ValueError("layers count from 0 to n_layers - 1, heads from 0")
        return self

    def rows(self) -> list[dict[str, Any]]:
        """One row a layer and site."""
        return [row.model_dump() for row in self.rows_]

    @property
    def worst(self) -> int | None:
        """Index of the row with the largest ratio."""
        ratios = [row.ratio for row in self.rows_]
        return ratios.index(max(ratios)) if ratios else None

    def summary(self) -> str:
        """One plain sentence; layers count from 0."""
        if self.worst is None:
            return f"{self.run.subject}: no massive token's keys or values to compare."
        row = self.rows_[self.worst]
        what = "value" if row.site == "v" else "key"
        return (
            f"{self.run.subject}: the massive token's {what} stands out most at layer {row.layer}, "
            f"head {row.head} (counted from 0): largest |entry| {row.token:.3g} against "
            f"{row.others:.3g}, {row.ratio:.3g} times."
        )
