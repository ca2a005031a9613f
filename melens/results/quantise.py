"""Quantisation: what number formats cost a model, and what keeping a few things whole buys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from melens.formatting import within
from melens.protocols import JsonObject
from melens.provenance import RunInfo
from melens.results.base import Part, Result, added_later
from melens.results.evaluation import Delta, Score

Role = Literal["as is", "protected", "control"]
SHOWN = 1e-4
"""Nats a token below which a difference is rounding of the losses themselves."""


class QuantisedTrial(Part):
    """One scheme with one thing kept in the model's own dtype."""

    name: str
    """``as is``, or what is kept whole: massive-token, first-tokens, prefix, super-weights,
    me-layers; of a control random-tokens, random-weights or random-layers."""
    role: Role
    control_of: str | None
    seed: int | None
    """What the control's choice was drawn with."""
    tokens: int
    """Tokens of all texts that are kept whole."""
    weights: tuple[str, ...]
    """Single weights, ``name[expert, output, input]`` of the checkpoint's tensor; without the
    expert where there is none."""
    modules: tuple[str, ...]
    """Linear layers that are not quantised at all, by their names in the checkpoint."""
    bits: float | None
    """Mean bits a weight of the linear layers, 16 for a scale and for what is kept whole; None
    where weights are not quantised."""
    loss: Score
    """Nats a token."""
    damage: Delta
    """loss - the loss of the model as it is on the same tokens."""
    kl: Score
    """KL(as it is || quantised) of the next token, nats."""
    agreement: Score
    """Share of tokens at which both put the same next token first."""
    bought: Delta | None = None
    """The damage as is - the damage here, paired; None for ``as is``."""
    share: Score | None = None
    """bought / the damage as is; None where that damage is not apart from zero."""
    beyond_random: Delta | None = None
    """The control's damage (mean over seeds) - this one's, paired; its interval allows for all
    protections of the run together, in loss and KL; None for controls, and where there is none."""

    kl_beyond_random: Delta | None = None
    """The same of KL."""

    @property
    def helps(self) -> bool:
        """Whether it leaves less loss or KL than as much kept at random, interval and all."""
        return self.helps_loss or _above(self.kl_beyond_random)

    @property
    def helps_loss(self) -> bool:
        """The same of the loss alone."""
        return _above(self.beyond_random)


class LinearLayers(Part):
    """Linear layers of one name in several blocks, whose weights a scheme rounds."""

    name: str
    """Of their weights in transformers' module tree, with ``*`` for the block; of one block its
    own name where blocks differ."""
    kind: Literal["Linear", "Conv1D", "experts"]
    """What transformers keeps them in: a module each, or all routed experts in one parameter."""
    inputs: int
    """Weights of a row."""
    group: int | None
    """Of these, how many share a scale where a scheme's is per group; None where none divides."""


def _above(found: Delta | None) -> bool:
    return found is not None and found.interval is not None and found.interval[0] > SHOWN


class SchemeTrials(Part):
    """One scheme, as it is and with things kept whole."""

    scheme: str
    about: str
    """What is rounded, and over which scales."""
    passes: int
    """Forward passes over the texts, those of the model as it is included."""
    unrounded: tuple[str, ...]
    """Modules with matrices that were not rounded, though an engine would: no pass runs them as
    modules, or they are experts of a layout that is not known."""
    trials: tuple[QuantisedTrial, ...]

    @property
    def as_is(self) -> QuantisedTrial:
        """The scheme with nothing kept."""
        return self.trials[0]

    def said(self) -> str:
        """What it costs and what helps, in a plain sentence."""
        first = self.as_is
        text = f"{self.scheme} costs {_nats(first.damage)}"
        if self.unrounded:
            text += f" ({len(self.unrounded)} modules left as they are)"
        protected = [t for t in self.trials if t.role == "protected"]
        helping = [t for t in protected if t.helps]
        compared = [t.beyond_random for t in protected if t.beyond_random is not None]
        if not compared:  # no control was run
            return f"{text}."
        if all(found.interval is None for found in compared):
            return f"{text}; what helps cannot be said of so few texts (20 are needed)."
        if not helping:
            return f"{text}; nothing that was kept whole helps more than as much at random does."
        parts: list[str] = []
        for one in sorted(helping, key=lambda t: t.damage.value):
            if one.helps_loss:
                share = "" if one.share is None else f", {one.share.value:.0%} less"
                parts.append(f"{one.name} {one.damage.value:.3g}{share}")
            else:
                parts.append(f"{one.name}, in KL alone, {one.kl.value:.3g} of {first.kl.value:.3g}")
        return f"{text}; kept whole: {'; '.join(parts)}."


class Quantisation(Result):
    """Loss of one model under several number formats, on the same texts."""

    schema_id: ClassVar[str] = "melens/quantise/1"

    kind: Literal["quantise"] = "quantise"
    schema_: Literal["melens/quantise/1"] = Field(default="melens/quantise/1", alias="schema")
    base_loss: Score
    """Of the model as it is, nats a token."""
    texts: int
    tokens: int
    """Scored: all but each text's first."""
    massive_tokens: int
    """Of these texts."""
    calibration_texts: int
    """Texts of the same source that gave static scales and were not scored."""
    me_layer: int | None
    """From 0, at the block output."""
    n_layers: int
    prefix: tuple[int, ...]
    """Token ids of the prefix that was computed without rounding; empty where none was tried."""
    left_out: tuple[str, ...]
    """Schemes and protections that were not tried, each with the reason."""
    schemes: tuple[SchemeTrials, ...]
    model_type: str | None = added_later()
    """Of the model's config in transformers, e.g. ``llama``."""
    linear: tuple[LinearLayers, ...] = added_later(())
    """What schemes round the weights of."""
    whole: tuple[str, ...] = added_later(())
    """Linear layers and routers that no scheme rounds, by their names in transformers' module
    tree, e.g. ``lm_head``."""
    run: RunInfo

    def rows(self) -> list[JsonObject]:
        """One row a scheme and trial."""
        return [
            {"scheme": found.scheme, **trial.model_dump(exclude={"weights", "modules"})}
            for found in self.schemes
            for trial in found.trials
        ]

    def scheme(self, name: str) -> SchemeTrials | None:
        """The trials of one scheme; None where it was not run."""
        return next((found for found in self.schemes if found.scheme == name), None)

    def covers(self, schemes: Sequence[str]) -> bool:
        """Whether each of the schemes was run, or said to be none for this model."""
        known = {found.scheme for found in self.schemes}
        known |= {said.partition(":")[0] for said in self.left_out}
        return known >= set(schemes)

    def summary(self) -> str:
        """One sentence a scheme."""
        head = f"{self.run.model}: {self.base_loss.value:.4g} nats a token as it is."
        return " ".join([head, *(found.said() for found in self.schemes)])


def _nats(found: Delta) -> str:
    return f"{found.value:.3g} nats a token{within(found.interval, '.3g')}"
