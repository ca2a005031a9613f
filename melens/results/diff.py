"""Difference: what became of the massive activation from one model to another. Layers from 0."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from melens.protocols import JsonObject
from melens.provenance import RunInfo, bos_said
from melens.results.base import Part, Result, added_later

Value = int | float | str | None


class SideInfo(Part):
    """One of the two that are compared."""

    name: str
    source: Literal["model", "locate", "check"]
    """Measured now, or read from a saved locate.json or report.json."""
    verdict: str
    me_layer: int | None
    n_layers: int
    d_model: int | None
    """None where a saved file does not say."""
    vocabulary: int | None
    dtype: str
    weights: str | None
    """Short hash of the weights."""
    ids: str | int | bool | None
    """Hash of the token ids that it was measured on."""
    bos_first: bool | None = added_later()
    """Whether these begin with BOS; None where some do, or where it is not known."""

    @property
    def subject(self) -> str:
        """Its name, and how its texts began."""
        if self.bos_first is None:
            return self.name
        return f"{self.name} ({bos_said(self.bos_first)})"


class Change(Part):
    """One number, name or layer beside the other's."""

    what: str
    a: Value
    b: Value
    changed: bool | None
    """Beyond its tolerance; None where it is shown but not judged (``note`` says why)."""
    measure: Literal["equal", "ratio", "factor", "difference", "cosine"]
    value: float | None = None
    """b / a (ratio, factor), b - a or the cosine; None for ``equal`` and where it is undefined."""
    tolerance: float | None = None
    """Relative for ``ratio``, up or down for ``factor``, absolute for ``difference``, the least for
    ``cosine``."""
    note: str = ""


class SideRow(Part):
    """One layer of both; None where a model does not have the layer or the number."""

    layer: int
    max_a: float | None
    """Largest |x| at the block's output."""
    max_b: float | None
    ratio: float | None
    """max_b / max_a."""
    share_a: float | None
    """The block's write share of the massive token."""
    share_b: float | None
    cosine: float | None
    """Between the massive token's residuals of both, where both are at hand."""


class Difference(Result):
    """Two located models, side by side, and what changed beyond tolerance."""

    schema_id: ClassVar[str] = "melens/diff/1"

    kind: Literal["diff"] = "diff"
    schema_: Literal["melens/diff/1"] = Field(default="melens/diff/1", alias="schema")
    verdict: Literal["same", "changed"]
    a: SideInfo
    b: SideInfo
    changes: tuple[Change, ...]
    profile: tuple[SideRow, ...]
    cannot: tuple[str, ...]
    """What could not be compared, with the reason."""
    notes: tuple[str, ...]
    run: RunInfo

    @model_validator(mode="after")
    def _fits_together(self) -> Difference:
        """Refuse what no comparison can have made; the exit code relies on it."""
        if (self.verdict == "changed") != any(row.changed for row in self.changes):
            raise ValueError("verdict must be 'changed' where a row is, and only there")
        layers = max(self.a.n_layers, self.b.n_layers)
        if [row.layer for row in self.profile] != list(range(layers)):
            raise ValueError("profile must have one row a layer, counted from 0")
        return self

    def rows(self) -> list[JsonObject]:
        """Everything that was compared."""
        return [row.model_dump() for row in self.changes]

    def shown(self) -> list[JsonObject]:
        """The same as text: a column of numbers and names cannot be aligned."""
        return [
            {**row, **{name: _text(row[name]) for name in ("a", "b", "changed")}}
            for row in self.rows()
        ]

    def changed(self) -> list[Change]:
        """The rows beyond their tolerance."""
        return [row for row in self.changes if row.changed]

    def summary(self) -> str:
        """One plain sentence; layers count from 0 at the block output."""
        names = f"{self.a.subject} against {self.b.subject}"
        rest = [row.what for row in self.changed() if row.what not in ("ME Layer", "verdict")]
        text = f"{names}: {self._layers()}"
        if rest:
            shown = ", ".join(rest[:6]) + (f" and {len(rest) - 6} more" if len(rest) > 6 else "")
            return f"{text}; changed: {shown}."
        if self.verdict == "same":
            alone = self.a.me_layer is None and self.b.me_layer is None
            compared = "nothing else that was compared" if alone else "nothing"
            return f"{text}; {compared} changed beyond tolerance."
        return f"{text}."

    def _layers(self) -> str:
        counted = "(counted from 0, at the block output)"
        first, second = self.a.me_layer, self.b.me_layer
        if first is None and second is None:
            return "neither has a massive token"
        if first is None:
            return f"a massive token appeared, ME Layer {second} {counted}, where there was none"
        if second is None:
            return f"the massive token is gone; it had ME Layer {first} {counted}"
        if self.a.n_layers != self.b.n_layers:
            return (
                f"ME Layer {first} of {self.a.n_layers} against {second} of {self.b.n_layers} "
                f"{counted}"
            )
        moved = (
            f"the ME Layer did not move: {first} in both {counted}"
            if first == second
            else f"the ME Layer moved from {first} to {second} {counted}"
        )
        if self.a.verdict != self.b.verdict:
            moved += f", the verdict went from {self.a.verdict} to {self.b.verdict}"
        return moved


def _text(value: Value) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
