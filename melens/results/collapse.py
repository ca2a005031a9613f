"""Collapse: how many directions activations fill, layer by layer. Layers count from 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from melens.protocols import JsonObject
from melens.provenance import RunInfo
from melens.results.base import Part, Result

SITES = ("resid_post", "ln1", "q", "k", "q_norm", "k_norm", "rot_q", "rot_k", "v")


class CollapseRow(Part):
    """One number of one site, over all rows and over all but the massive tokens' rows."""

    layer: int
    site: str
    """resid_post (block output), ln1 (attention input after its norm), q, k, q_norm, k_norm (after
    QK-norm), rot_q, rot_k (after RoPE), v."""
    head: int | None
    """Query head, or key-value head at k, k_norm, rot_k and v; None where there are no heads."""
    definition: str
    """effective_rank, participation_ratio, stable_rank, matrix_entropy, top1_share; ``_centred``
    where the mean row was taken off first. Formulas: docs/definitions.md."""
    with_token: float | None
    """Per sequence, then averaged; None where it is undefined (all rows zero, or equal)."""
    without_token: float | None
    """The same without the massive tokens' rows; None also where nothing is massive."""


class Collapse(Result):
    """Effective rank and its relatives, at every site and head, with and without one row."""

    schema_id: ClassVar[str] = "melens/collapse/1"

    kind: Literal["collapse"] = "collapse"
    schema_: Literal["melens/collapse/1"] = Field(default="melens/collapse/1", alias="schema")
    me_layer: int | None
    n_layers: int
    sequences: int
    sequences_massive: int
    """Sequences from which at least one row was left out."""
    rows_: tuple[CollapseRow, ...] = Field(alias="rows")
    missing: tuple[str, ...]
    """Sites that this model does not show, with the reason."""
    run: RunInfo

    @model_validator(mode="after")
    def _fits_together(self) -> Collapse:
        """Refuse what no run can have made."""
        if not self.rows_ or any(not 0 <= row.layer < self.n_layers for row in self.rows_):
            raise ValueError("rows must be there, with layers counted from 0 to n_layers - 1")
        return self

    def rows(self) -> list[JsonObject]:
        """Every number."""
        return [row.model_dump() for row in self.rows_]

    def curve(
        self, site: str, definition: str = "effective_rank"
    ) -> tuple[list[float | None], list[float | None]]:
        """One definition by layer, with and without the token, averaged over heads.

        A layer that does not have the site holds None.
        """
        found: dict[int, list[CollapseRow]] = {}
        for row in self.rows_:
            if (row.site, row.definition) == (site, definition):
                found.setdefault(row.layer, []).append(row)
        layers = [found.get(layer, []) for layer in range(self.n_layers)]
        return (
            [known_mean([row.with_token for row in rows]) for rows in layers],
            [known_mean([row.without_token for row in rows]) for rows in layers],
        )

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites that the rows hold, in the order of SITES."""
        held = {row.site for row in self.rows_}
        return tuple(site for site in SITES if site in held)

    def grids(self) -> dict[str, list[float | None]]:
        """``definition.site.with_token`` and ``without_token``: (n_layers,), heads averaged."""
        found: dict[str, list[float | None]] = {}
        for definition in dict.fromkeys(row.definition for row in self.rows_):
            for site in self.sites:
                curves = self.curve(site, definition)
                for name, curve in zip(("with_token", "without_token"), curves, strict=True):
                    found[f"{definition}.{site}.{name}"] = curve
        return found

    def overview(self, definition: str = "effective_rank") -> list[JsonObject]:
        """By layer and site, heads averaged: the number with / without the token."""
        curves = {site: self.curve(site, definition) for site in self.sites}
        return [
            {"layer": layer}
            | {site: _both(kept[layer], left[layer]) for site, (kept, left) in curves.items()}
            for layer in range(self.n_layers)
        ]

    def shown(self) -> list[JsonObject]:
        """Effective rank by layer and site; the full table has thousands of rows."""
        return self.overview()

    def summary(self) -> str:
        """One plain sentence about effective rank around the ME Layer, uncentred."""
        name = (
            f"{self.run.subject}: effective rank exp(H(s / sum s)), uncentred, averaged over heads"
        )
        if self.me_layer is None:
            return f"{name}; no massive token, so nothing to leave out."
        after = max(self.me_layer, 0)
        parts = [self._step("resid_post", after)]
        parts += [self._step(site, min(after + 1, self.n_layers - 1)) for site in ("q", "k")]
        said = "; ".join(part for part in parts if part)
        return f"{name} (without the massive token in brackets): {said}. Layers count from 0."

    def _step(self, site: str, layer: int) -> str | None:
        kept, left = self.curve(site)
        if kept[layer] is None:
            return None
        here = f"{site} of layer {layer}: {_both(kept[layer], left[layer])}"
        if layer == 0 or kept[layer - 1] is None:
            return here
        return f"{here}, the layer before {_both(kept[layer - 1], left[layer - 1])}"


def known_mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are there."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def _both(kept: float | None, left: float | None) -> str:
    if kept is None:
        return "-"
    return f"{kept:.1f}" if left is None else f"{kept:.1f} ({left:.1f})"
