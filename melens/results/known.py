"""KnownCheck: a result beside what was published about the same model."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from melens.protocols import JsonObject
from melens.provenance import bos_said
from melens.results.base import Part, Result, added_later

CONVENTION = (
    "Layers are 0-based block indices, measured at the block's output (resid_post): a source that "
    "counts hidden_states from 1, or block inputs, is one higher."
)


class Comparison(Part):
    """One published number beside the measured one."""

    what: str
    published: str
    measured: str
    verdict: Literal["match", "mismatch", "unknown"]
    """unknown: it does not fit, and the texts of this run begin in another way than those of the
    published one, or may make it differ."""
    place: bool = False
    """A layer or a dimension, which is the model's; sizes and stages are the text's as well."""
    off: str | None = added_later()
    """By how much it does not fit: layers, percent, a factor."""
    source: str | None = added_later()
    """Whose number it is; several sources with the same number are one row."""


class KnownCheck(Result):
    """A result against what was published about the same model."""

    schema_id: ClassVar[str] = "melens/known/1"

    kind: Literal["known"] = "known"
    schema_: Literal["melens/known/1"] = Field(default="melens/known/1", alias="schema")
    model: str
    verdict: Literal["match", "mismatch", "unknown"]
    comparisons: tuple[Comparison, ...]
    source: str | None
    meant: str | None = None
    """A name on record that is close to one that is not."""
    named: bool = added_later(False)
    """The name is on record, but only with numbers of other kinds or of a model of another size."""
    bos_first: bool | None = added_later()
    """Whether the texts that it was located on begin with BOS, where that is known."""
    convention: str = CONVENTION

    def rows(self) -> list[JsonObject]:
        """One row a published number."""
        return [
            {name: getattr(row, name) for name in Comparison.model_fields}
            for row in self.comparisons
        ]

    def summary(self) -> str:
        """One plain sentence."""
        if self.source is None:
            if self.named:
                return (
                    f"{self.model} is on record, but without a number of this kind and size; "
                    "known compares locate, scan, super-weights, sinks and report.json."
                )
            hint = f" Did you mean {self.meant}?" if self.meant else ""
            return f"{self.model}: unknown, nothing published is on record for this name.{hint}"
        bad = [
            f"{row.what} ({row.measured}, published {row.published}: {row.off})"
            if row.off
            else row.what
            for row in self.comparisons
            if row.verdict == "mismatch"
        ]
        detail = f" in {', '.join(bad)}" if bad else ""
        start = "" if self.bos_first is None else f" ({bos_said(self.bos_first)})"
        return f"{self.model}{start}: {self.verdict}{detail} (source: {self.source})."
