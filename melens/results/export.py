"""EditFile: melens.json, what was exported and how to take it up again."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from melens.provenance import RunInfo
from melens.results.base import Part, Result
from melens.results.edit import Edit
from melens.results.locate import MELayer

Format = Literal["hf", "prefix", "peft"]


class Probe(Part):
    """What the model without the edit answers to fixed tokens: tells weights apart in any dtype."""

    ids: tuple[int, ...]
    at: tuple[int, ...]
    """Vocabulary entries whose logits were kept."""
    logits: tuple[float, ...]
    """At the last of ``ids``, in ``at``'s order."""
    dtype: str


class PrefixFacts(Part):
    """The first token whose keys and values were exported in its place."""

    token_id: int
    token: str
    position: Literal[0] = 0
    """Absolute; keys carry the rotation of this position, so nothing may stand before it."""
    layers: int
    kv_heads: int | None
    """None where layers differ."""
    head_dim: int | None
    dtype: str
    sliding_window: int | None
    """In such layers the token leaves the attention of tokens this far after it, as it would."""
    logit_difference: float
    """Largest, on a few tokens, from the model with the edit and the token itself."""


class EditFile(Result):
    """An edit of one model, saved beside its weights, as a prefix, or as a PEFT adapter."""

    schema_id: ClassVar[str] = "melens/edit/1"

    kind: Literal["edit"] = "edit"
    schema_: Literal["melens/edit/1"] = Field(default="melens/edit/1", alias="schema")
    format: Format
    edit: Edit
    me_layer: MELayer | None
    """Where the massive token emerges; None where the edit names its layers itself and acts on
    the first token."""
    probe: Probe
    prefix: PrefixFacts | None = None
    files: tuple[str, ...] = ()
    """Names beside this file that the export wrote: all that a later one may replace."""
    run: RunInfo

    @model_validator(mode="after")
    def _fits_together(self) -> EditFile:
        """Refuse what no export can have made."""
        if (self.prefix is None) != (self.format == "hf"):
            raise ValueError("prefix facts belong to the formats prefix and peft")
        if len(self.probe.at) != len(self.probe.logits):
            raise ValueError("the probe must have one logit an entry")
        return self

    def rows(self) -> list[dict[str, Any]]:
        """One row of facts."""
        row: dict[str, Any] = {"format": self.format, "edit": self.edit.label}
        row["me_layer"] = self.me_layer.me_layer if self.me_layer else None
        if self.prefix is not None:
            row["first_token"] = repr(self.prefix.token)
            row["logit_difference"] = self.prefix.logit_difference
        return [row]

    def summary(self) -> str:
        """One plain sentence."""
        start = f"{self.run.subject} with the edit {self.edit.label}"
        if self.prefix is None:
            return f"{start}, to be applied again by melens.load."
        return (
            f"{start} as keys and values of the first token {self.prefix.token!r} in "
            f"{self.prefix.layers} layers ({self.format}); logits off the edit's by at most "
            f"{self.prefix.logit_difference:.1g}. Leave that token out of the input."
        )
