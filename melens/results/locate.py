"""MELayer: where massive activations emerge in one model. Layers count from 0, block outputs."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from melens.protocols import JsonObject
from melens.provenance import RunInfo
from melens.results.base import Part, Result, added_later

Verdict = Literal["single", "multi-step", "gradual", "re-emergent", "none"]
FINAL_WINDOW = 0.1
"""The last tenth of the layers (at least one) prepares the unembedding: growth that appears only
there is no emergence, because hardly any layer is left to read it."""


def last_body_layer(n_layers: int) -> int:
    """The last layer in which emergence may happen; those after it are the final window."""
    return n_layers - 1 - min(max(1, round(FINAL_WINDOW * n_layers)), n_layers - 1)


class LayerRow(Part):
    """One layer's output. Residual units unless said; ``layer`` -1 would be the embedding."""

    layer: int
    max: float
    """Largest |x| over all sequences, tokens and dimensions."""
    median: float
    """Median |x| over tokens and dimensions of a sequence, averaged over sequences."""
    token_median: float
    """Median |x| over the dimensions of the token that holds ``max``."""
    norm_ratio: float
    """Norm of the heaviest token over the median token norm, averaged over sequences."""
    median_norm: float
    """Median token norm of a sequence, averaged over sequences."""
    position: int
    """Absolute position of the token that holds ``max``; padding does not count."""
    dim: int
    value: float
    """The signed entry behind ``max``."""
    write_share: float | None
    """This block's share of the massive token's vector at its peak; None without one."""


class Criteria(Part):
    """Every criterion's own answer (a layer), None = never. Formulas: docs/definitions.md."""

    sun_layer: int | None
    sun_token: int | None
    ratio_jump: int | None
    max_jump: int | None
    difference: int | None
    first_share: int | None
    write_share: int | None
    direction: int | None


class Stage(Part):
    """A stretch of layers over which the token stays large."""

    layer: int
    """The step that adds most within this stage."""
    peak: float
    """Largest |x| of the token within the stage."""
    peak_layer: int
    norm_ratio: float
    """Largest token norm over the median token norm of the same layer, within the stage."""
    position: int
    dim: int
    erased_at: int | None
    """First layer at whose output less than half of the stage's peak norm is left."""


class MassiveToken(Part):
    """A token and a dimension in which it is massive; the same token later than position 0, at
    whatever positions, is one row.
    """  # noqa: D205

    position: int
    """0 for the first token, else the earliest position it was seen massive at."""
    token_id: int
    token: str
    dim: int
    value: float
    """Its largest entry before the final layers, signed."""
    frequency: float
    """Share of the sequences in which this is massive."""


class Writer(Part):
    """Who wrote it: shares of the growth from the first counted layer to the peak; sum 1."""

    attention: float
    ffn: float


class Cumulative(Part):
    """Layers at which the cumulative write share reaches 10, 50 and 90 %."""

    p10: int | None = None
    p50: int | None = None
    p90: int | None = None


class FinalGrowth(Part):
    """Growth in the last layers that the massive token's direction does not explain."""

    layer: int
    factor: float
    """max |x| of this layer over the previous one's."""
    position: int
    dim: int
    value: float


class FirstToken(Part):
    """One observation of what another first token does, alone at position 0."""

    token_id: int
    token: str
    massive: bool
    me_layer: int | None
    value: float
    """Its largest entry before the final layers, signed."""


class Stability(Part):
    """Independent observations: with one fixed first token all texts are a single one."""

    observations: int
    agreeing: int
    sequences: int
    sequences_massive: int
    first_tokens: tuple[FirstToken, ...]


class Missed(Part):
    """A threshold that the nearest coordinate does not pass."""

    threshold: Literal["absolute", "median", "norm", "sharing"]
    """|x|; |x| over the median; norm over the median token norm; tokens that share the dimension"""
    value: float
    needed: float
    """More than this (``norm``: at least; ``sharing``: at most)."""

    def said(self) -> str:
        """As a piece of a sentence."""
        if self.threshold == "sharing":
            return f"{self.value:.0f} tokens share the dimension, at most {self.needed:.0f} may"
        unit = {
            "absolute": "|x| above {}",
            "median": "{} x the median",
            "norm": "{} x the median token norm",
        }[self.threshold]
        by = "" if self.value >= self.needed else f" by {1 - self.value / self.needed:.1%}"
        return f"it misses {unit.format(f'{self.needed:,g}')}{by}"


class NearestMiss(Part):
    """The coordinate that comes nearest to being massive where none is."""

    layer: int
    position: int
    token_id: int
    token: str
    dim: int
    value: float
    """Signed, the token's largest."""
    median_ratio: float | None
    """|value| over the median |x| of the layer output of its sequence; None where that is 0."""
    norm_ratio: float
    """Its token's norm over the median token norm."""
    missed: tuple[Missed, ...]

    def said(self) -> str:
        """As a piece of a sentence."""
        times = "" if self.median_ratio is None else f"{self.median_ratio:,.0f} x the median and "
        text = (
            f"the nearest is {self.value:,.4g} in dimension {self.dim} at layer {self.layer} "
            f"(token {self.token!r} at position {self.position}): {times}"
            f"{self.norm_ratio:.1f} x the median token norm"
        )
        return "; ".join([text, *(missed.said() for missed in self.missed)])


class MELayer(Result):
    """Where massive activations emerge, who writes them, and how sure that is."""

    schema_id: ClassVar[str] = "melens/locate/1"

    kind: Literal["locate"] = "locate"
    schema_: Literal["melens/locate/1"] = Field(default="melens/locate/1", alias="schema")
    verdict: Verdict
    me_layer: int | None = None
    """Layer where what stays first appears (``first_share``); None only for ``none``, -1 where the
    embedding itself is massive.
    """
    main_layer: int | None = None
    """The step that adds most (``write_share``); None only for ``none``."""
    effective_layers: float | None = None
    """exp(entropy) of the positive write shares up to the peak; 1 = one layer."""
    confidence: float = Field(ge=0, le=1)
    """That one layer explains it: agreement between criteria x stability over observations x
    share of the largest step, in [0, 1]; for ``none``, how far every token stayed from massive.
    """
    n_layers: int
    criteria: Criteria
    cumulative: Cumulative = Cumulative()
    stages: tuple[Stage, ...] = ()
    peak_layer: int | None = None
    erase_layer: int | None = None
    massive: tuple[MassiveToken, ...]
    nearest: NearestMiss | None = added_later()
    """Only for ``none``; results of older versions do not have it."""
    writer: Writer | None = None
    final_layer_growth: FinalGrowth | None
    stability: Stability
    profile: tuple[LayerRow, ...]
    run: RunInfo

    @model_validator(mode="after")
    def _fits_together(self) -> MELayer:
        """Refuse what no run can have made; figures and sentences rely on it."""
        if [row.layer for row in self.profile] != list(range(self.n_layers)) or not self.profile:
            raise ValueError("profile must have one row a layer, counted from 0")
        named = (self.me_layer, self.main_layer, self.peak_layer)
        found = self.verdict != "none"
        if any((layer is not None) != found for layer in named) or bool(self.massive) != found:
            raise ValueError("verdict, layers and massive tokens must go together")
        if any(min(token.position, token.token_id, token.dim) < 0 for token in self.massive):
            raise ValueError("positions, token ids and dimensions count from 0")
        if any(layer is not None and not -1 <= layer < self.n_layers for layer in named):
            raise ValueError(f"layers must be within -1 and {self.n_layers - 1}")
        said = self.criteria.first_share, self.criteria.write_share
        if found and (self.me_layer, self.main_layer) != said:
            raise ValueError("me_layer and main_layer must be what their criteria say")
        return self

    def rows(self) -> list[JsonObject]:
        """The layer profile."""
        return [row.model_dump() for row in self.profile]

    @property
    def level(self) -> str:
        """``high``, ``medium`` or ``low``: the confidence in one word."""
        return "high" if self.confidence >= 0.7 else "medium" if self.confidence >= 0.4 else "low"

    @property
    def claim(self) -> str:
        """What the confidence is about."""
        return "there is none" if self.verdict == "none" else "one layer explains it"

    @property
    def near_miss(self) -> str:
        """What came nearest to being massive, to follow a sentence that says that nothing is."""
        return "" if self.nearest is None else f"; {self.nearest.said()}"

    def summary(self) -> str:
        """One plain sentence; layers count from 0 at the block output."""
        if self.verdict == "none":
            sure = self._sureness()
            return f"{self.run.subject}: {self._without()}{self.near_miss}{self._blind()} ({sure})."
        first = self.massive[0]
        text = f"{self.run.subject}: {self.verdict} emergence"
        if self.verdict in ("gradual", "multi-step"):
            text += f" over layers {self.cumulative.p10} to {self.cumulative.p90} (10 to 90 %), "
            text += f"main step at layer {self.main_layer}"
        text += (
            f", ME Layer {self.me_layer} of {self.n_layers} (counted from 0, at the block output), "
            f"{self._origin()}; token {first.token!r} at position {first.position}{self._tie()} "
            f"reaches {first.value:,.0f} in dimension {first.dim}"
        )
        if self.erase_layer is not None:
            text += f"; erase layer {self.erase_layer}"
        text += self._of_texts()
        return f"{text} ({self._sureness()})."

    @property
    def alike(self) -> int:
        """Massive tokens as frequent as the primary one, itself included."""
        most: dict[tuple[bool, int], float] = {}
        for token in self.massive:
            at = token.position == 0, token.token_id
            most[at] = max(most.get(at, 0.0), token.frequency)
        primary = next(iter(most), None)
        return sum(
            primary is not None and at[0] == primary[0] and share == most[primary]
            for at, share in most.items()
        )

    def _tie(self) -> str:
        """That others are as frequent as the token that speaks for the model."""
        return "" if self.alike < 2 else f" (the middle one of {self.alike} equally frequent ones)"

    def _of_texts(self) -> str:
        """How many texts this is said of, where it is not all of them."""
        found, of = self.stability.sequences_massive, self.stability.sequences
        said = ""
        if self.run.settings.get("bos") is True and not any(t.position == 0 for t in self.massive):
            said = "; the BOS that you forced is not massive here"
        if found < of:
            said += f"; {found} of {of} texts {'has' if found == 1 else 'have'} a massive token"
        return said

    def _origin(self) -> str:
        if self.writer is None and (self.me_layer or 0) >= 0:
            return "by parts that cannot be told apart"
        if self.writer is None:
            return "already in the embedding (-1)"
        by = (
            "the FFN" if self.writer.ffn >= 0.5 else "attention (or what mixes tokens in its place)"
        )
        return f"written by {by}"

    @property
    def _mute(self) -> bool:
        """Whether no text is evidence, and repeated ones hold what might be massive."""
        told = [self.run.settings.get(f"{kind}_texts") or 0 for kind in ("repeated", "unknown")]
        return bool(told[0]) and sum(map(int, told)) == self.stability.sequences

    def _blind(self) -> str:
        """Why texts of a few tokens cannot show that there is nothing."""
        if not self._mute:
            return ""
        body = self.profile[: last_body_layer(self.n_layers) + 1]
        row = max(body, key=lambda row: row.max)
        return (
            "; the median of a text that repeats a few tokens is theirs, and none stands out from "
            f"it: |x| reaches {row.max:,.0f} in dimension {row.dim} at layer {row.layer}; give "
            "texts of varied words"
        )

    def _without(self) -> str:
        """What there is instead of a massive token."""
        if self._mute:
            return "no massive token can be told from these texts"
        if self.criteria.sun_layer is None:
            return "no massive activations"
        row = max(self.profile, key=lambda row: row.max)
        return (
            "no token stands out, so no massive activations by definition, but |x| reaches "
            f"{row.max:,.0f} in dimension {row.dim} (layer {row.layer}) on many tokens or only in "
            "the last layers"
        )

    def _sureness(self) -> str:
        return f"confidence that {self.claim}: {self.confidence:.2f}, {self.level}"
