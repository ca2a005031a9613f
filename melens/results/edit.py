"""Edit: one edit of a model by name and settings; EditFile: what was exported, melens.json."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from melens.protocols import JsonObject
from melens.provenance import RunInfo
from melens.results.baked import Baked
from melens.results.base import Part, Result, added_later
from melens.results.locate import MELayer

MELENS_JSON = "melens.json"
"""An exported folder's record of its edit."""
EditName = Literal["none", "wemask", "zero", "mean", "norm-flatten", "ffn-cap", "drop-key"]
Select = Literal["gamma", "activation", "product", "random", "bottom", "bottom-gamma"]
RATED: tuple[EditName, ...] = ("wemask",)
COORDINATES: tuple[EditName, ...] = ("zero", "mean")
LAYERED: tuple[EditName, ...] = ("wemask", "drop-key")


class Edit(Part):
    """An edit without its model; two of them are equal if they do the same.

    none: the model as it is. wemask: the mask. zero, mean: the massive coordinates after the ME
    Layer set to 0 or to their mean (Sun et al.). norm-flatten, ffn-cap: at the ME Layer. drop-key:
    the sink token's key and value hidden from later tokens.
    """

    name: EditName = "wemask"
    select: Select = "gamma"
    """Rule for a mask's dimensions, as ``rate`` and ``seed``; zero and mean take ``random``: as
    many dimensions as are massive, drawn by ``seed``."""
    rate: float = Field(default=0.5, ge=0, le=1)
    strength: float = Field(default=1.0, ge=0, le=1)
    """0 changes nothing, 1 is the whole edit."""
    layers: Literal["after", "next"] | tuple[int, ...] = "after"
    """Layers from 0 that a mask or a dropped key acts in, or which of those after the ME Layer;
    for the others one layer in place of the ME Layer."""
    seed: int = Field(default=0, ge=0)
    start: int = Field(default=0, ge=0)
    """Position from which on queries miss a dropped key; drop-key's alone."""

    @model_validator(mode="after")
    def _means_something(self) -> Edit:
        """Refuse settings that the named edit does not have."""
        given = self.model_fields_set
        if self.name not in RATED and "rate" in given:
            raise ValueError(f"{self.name} has no rate; that is wemask's")
        if self.name not in RATED and given & {"select", "seed"}:
            if self.name not in COORDINATES:
                raise ValueError(f"{self.name} has no select or seed; those are wemask's")
            if self.select != "random":
                raise ValueError(f"{self.name} takes the massive dimensions, or select='random'")
        if self.name != "drop-key" and "start" in given:
            raise ValueError(f"{self.name} has no start; that is drop-key's")
        if isinstance(self.layers, tuple) and (not self.layers or min(self.layers) < 0):
            raise ValueError("layers must be 'after', 'next' or numbers from 0")
        if self.name not in LAYERED and "layers" in given and len(self.layers) != 1:
            raise ValueError(f"{self.name} acts at one layer: the ME Layer, or layers=(n,)")
        return self

    @model_serializer(mode="wrap")
    def _own_settings(self, write: SerializerFunctionWrapHandler) -> JsonObject:
        """No default of a setting that the named edit lacks: what is written can be read again."""
        foreign: set[str] = set()
        if self.name not in RATED:
            foreign |= {"select", "rate", "seed"}
        if self.name not in LAYERED:
            foreign |= {"layers"}
        foreign -= self.model_fields_set
        if not self.start:
            foreign |= {"start"}
        return {key: value for key, value in write(self).items() if key not in foreign}

    def changed(self, **settings: object) -> Edit:
        """The same edit with other settings."""
        return Edit.model_validate({**self.model_dump(exclude_unset=True), **settings})

    @property
    def dosed_by(self) -> Literal["rate", "strength"]:
        """Which setting is its dose."""
        return "rate" if self.name in RATED else "strength"

    @property
    def label(self) -> str:
        """Short name for tables and axes."""
        if self.name == "none":
            return "none"
        parts: list[str] = [self.name]
        if self.name in RATED:
            parts += [self.select, f"rate {self.rate:g}"]
        if self.select == "random":
            parts.append(f"{'' if self.name in RATED else 'random dims '}seed {self.seed}")
        if self.strength != 1:
            parts.append(f"strength {self.strength:g}")
        if self.name in LAYERED or self.layers != "after":
            parts.append(_layers(self.layers))
        if self.start:
            parts.append(f"from position {self.start}")
        return " ".join(parts)


def _layers(layers: str | tuple[int, ...]) -> str:
    if isinstance(layers, str):
        return {"after": "all later layers", "next": "next layer"}[layers]
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    shown = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"layer{'s' * (len(set(layers)) > 1)} {shown}"


Format = Literal["hf", "prefix", "peft", "gguf"]
CONSTANT: tuple[Format, ...] = ("prefix", "peft")
"""Formats that hold keys and values of first tokens."""


class Probe(Part):
    """What the model without the edit answers to fixed tokens: tells weights apart in any dtype."""

    ids: tuple[int, ...]
    at: tuple[int, ...]
    """Vocabulary entries whose logits were kept."""
    logits: tuple[float, ...]
    """At the last of ``ids``, in ``at``'s order."""
    dtype: str


class ChosenPrefix(Part):
    """Tokens put before every text, so that no later token turns massive; found by search.

    Source: PrefixQuant, 2024 (arXiv 2410.05265).
    """

    token_ids: tuple[int, ...] = Field(min_length=1)
    tokens: tuple[str, ...]
    starts_texts: bool
    """Whether the first of them is what the texts begin with (BOS): it then stands for theirs."""
    tried: int
    """Prefixes that were run."""
    counted: int
    """Tokens of the reference texts, those that the prefix stands for left out."""
    massive_without: int
    massive_with: int
    """How many of them are massive without the prefix, and with it."""
    loss_without: float
    loss_with: float
    """Nats a token, over every text's tokens after its first."""

    def sentence(self) -> str:
        """What it does, in words."""
        return (
            f"{self.massive_with} of {self.counted} tokens after the prefix are massive "
            f"({self.massive_without} without it); loss {self.loss_with:.3f} nats per token "
            f"({self.loss_without:.3f} without it)"
        )


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
    learned: bool = added_later(False)
    """Whether the column was trained: it is no edit of the token any more."""
    chosen: ChosenPrefix | None = added_later(None)
    """The tokens of a prefix that was searched; the first of them is ``token_id``."""


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
    baked: tuple[Baked, ...] = added_later(())
    """Changes that the weights beside this file hold already, the oldest first."""
    files: tuple[str, ...] = ()
    """Names beside this file that the export wrote: all that a later one may replace."""
    run: RunInfo

    @model_validator(mode="after")
    def _fits_together(self) -> EditFile:
        """Refuse what no export can have made."""
        if (self.prefix is None) != (self.format not in CONSTANT):
            raise ValueError("prefix facts belong to the formats prefix and peft")
        if self.baked and self.format in CONSTANT:
            raise ValueError("baked weights belong to the formats hf and gguf")
        if self.format == "gguf" and (self.edit.name != "none" or not self.baked):
            raise ValueError("a gguf holds changed weights alone")
        if len(self.probe.at) != len(self.probe.logits):
            raise ValueError("the probe must have one logit an entry")
        return self

    def rows(self) -> list[JsonObject]:
        """One row of facts."""
        row: JsonObject = {"format": self.format, "edit": self.edit.label}
        row["me_layer"] = self.me_layer.me_layer if self.me_layer else None
        if self.prefix is not None:
            row["first_token"] = repr(self.prefix.token)
            row["logit_difference"] = self.prefix.logit_difference
        return [row]

    def summary(self) -> str:
        """One plain sentence."""
        start = f"{self.run.subject} with the edit {self.edit.label}"
        if self.prefix is None and self.edit.name == "none" and self.baked:
            last, earlier = self.baked[-1], len(self.baked) - 1
            more = f" (after {earlier} earlier exports of this kind)" if earlier else ""
            said = "; ".join(edit.label for edit in last.edits[:3])
            rest = f"; and {len(last.edits) - 3} more" if len(last.edits) > 3 else ""
            return (
                f"{self.run.subject} with changed weights{more}: {said}{rest}. Logits moved by up "
                f"to {last.logit_change:.2g}, and differ from the edits on the running model by at "
                f"most {last.logit_difference:.1g}. Any engine that loads it has them."
            )
        if self.prefix is None:
            return f"{start}, to be applied again by melens.load."
        if (chosen := self.prefix.chosen) is not None:
            return (
                f"{self.run.subject} with keys and values of {', '.join(map(repr, chosen.tokens))} "
                f"before every text ({self.format}): {chosen.sentence()}."
            )
        if self.prefix.learned:
            return (
                f"{self.run.subject} with a learned key and value in place of the first token "
                f"{self.prefix.token!r} in {self.prefix.layers} layers ({self.format}); logits off "
                f"that token's by up to {self.prefix.logit_difference:.2g}. Leave it out of the "
                "input."
            )
        return (
            f"{start} as keys and values of the first token {self.prefix.token!r} in "
            f"{self.prefix.layers} layers ({self.format}); logits off the edit's by at most "
            f"{self.prefix.logit_difference:.1g}. Leave that token out of the input."
        )
