"""Sinks: which keys draw attention, layer by layer and head by head. Layers count from 0."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from melens.formatting import counted
from melens.protocols import JsonObject
from melens.provenance import RunInfo
from melens.results.base import ByLayer, Part, Result, added_later

SINK_EPS = 0.3
"""A head has a sink on a key that draws at least this much attention on average (Gu et al.)."""
USUAL_EPS = str(SINK_EPS)
"""SINK_EPS as the key in results."""
SINK_RATE = 0.3
"""A layer is said to have sinks from this share of its (text, head) on; a definition of melens."""


class HeadSink(Part):
    """One head. Heads are query heads, counted from 0."""

    layer: int
    head: int
    alpha: float
    """Mean attention that the first token receives from queries 0 to T - 1."""
    rate: dict[str, float]
    """Share of the sequences in which that exceeds eps: Sink^eps of this head."""
    entropy: float
    """Mean attention entropy of the queries after the first, in nats."""


class KeySink(Part):
    """A key position that exceeds the smallest eps in some sequence: Sink_k^eps of one head."""

    layer: int
    head: int
    position: int
    alpha: float
    """Mean over the sequences that have the key with at least LEAST_QUERIES queries behind it."""
    rate: dict[str, float]
    queries: int
    """Queries behind these numbers, over all sequences."""


class TokenSink(Part):
    """One massive token: what it draws, apart from all others."""

    position: int
    """The earliest position it was met at."""
    token_id: int
    token: str
    count: int
    """How often it was met within the first T tokens."""
    attention: ByLayer
    """Mean over heads and occurrences of alpha."""
    sink_rate: dict[str, ByLayer]
    overall: dict[str, float]


class Span(Part):
    """A stretch of layers, both ends included; layers without attention do not end it."""

    first: int
    last: int

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


class Sinks(Result):
    """Attention sinks by Gu et al.'s measure, on the first token and on other massive ones."""

    schema_id: ClassVar[str] = "melens/sinks/1"

    kind: Literal["sinks"] = "sinks"
    schema_: Literal["melens/sinks/1"] = Field(default="melens/sinks/1", alias="schema")
    me_layer: int | None
    n_layers: int
    t: int
    """T: tokens of a sequence that count, at most."""
    sequences: int
    sink_rate: dict[str, ByLayer]
    """Sink^eps of the first token: share of (sequence, head) with alpha > eps, by layer."""
    overall: dict[str, float]
    """The same over all layers that have attention."""
    head_rate: dict[str, ByLayer]
    """Another definition: share of heads whose alpha, averaged over sequences, exceeds eps."""
    attention_to_token: ByLayer
    """Mean over heads and sequences of the first token's alpha."""
    uniform: float
    """What the first token would draw if every query looked at all its keys alike."""
    entropy: ByLayer
    """Mean attention entropy of the queries after the first, in nats."""
    tokens: tuple[TokenSink, ...]
    """Massive tokens, first tokens before later ones."""
    others: dict[str, ByLayer] | None
    """Sink^eps of the massive tokens after the first, over (occurrence, head); None without."""
    onset_layer: int | None
    """First layer in which at least ONSET_SHARE of (sequence, head) have a sink at SINK_EPS."""
    spans: tuple[Span, ...]
    """All stretches of layers that pass the same rule: sinks can vanish and come back."""
    onset_of: Literal["first", "others"]
    """Which massive tokens the onset is about: later ones only where no first token is massive."""
    onset_rule: str
    learned_sink: tuple[tuple[float, ...] | None, ...] = added_later(())
    """By layer and head: what a learned sink logit takes of each row, mean over queries (gpt-oss);
    None for a layer without one, () where no layer has one."""
    heads: tuple[HeadSink, ...]
    keys: tuple[KeySink, ...]
    run: RunInfo

    @model_validator(mode="after")
    def _fits_together(self) -> Sinks:
        """Refuse what no run can have made."""
        curves = [
            *self.sink_rate.values(),
            *self.head_rate.values(),
            self.attention_to_token,
            self.entropy,
        ]
        curves += (self.others or {}).values()
        curves += [c for token in self.tokens for c in (token.attention, *token.sink_rate.values())]
        if any(len(curve) != self.n_layers for curve in curves):
            raise ValueError("every curve must have one entry a layer")
        if self.learned_sink and len(self.learned_sink) != self.n_layers:
            raise ValueError("learned_sink must have one entry a layer")
        rows = [*self.heads, *self.keys]
        if not self.heads or any(not 0 <= row.layer < self.n_layers for row in rows):
            raise ValueError("heads must be there, layers counted from 0 to n_layers - 1")
        if set(self.sink_rate) != set(self.overall):
            raise ValueError("sink_rate and overall must hold the same eps")
        return self

    @property
    def usual_rate(self) -> float | None:
        """``overall`` at SINK_EPS; None where the result does not hold it."""
        return self.overall.get(USUAL_EPS)

    @property
    def shown_eps(self) -> str:
        """The eps that a figure or a tile shows: SINK_EPS, else the smallest there is."""
        return USUAL_EPS if USUAL_EPS in self.overall else min(self.overall)

    def _taken(self, layer: int) -> float | None:
        heads = self.learned_sink[layer]
        return None if not heads else sum(heads) / len(heads)

    def rows(self) -> list[JsonObject]:
        """The first token's numbers, one row a layer."""
        return [
            {"layer": layer}
            | {f"sink_{eps}": curve[layer] for eps, curve in self.sink_rate.items()}
            | {f"others_{eps}": curve[layer] for eps, curve in (self.others or {}).items()}
            | {
                "attention_to_token": self.attention_to_token[layer],
                "entropy": self.entropy[layer],
            }
            | ({"learned_sink": self._taken(layer)} if self.learned_sink else {})
            for layer in range(self.n_layers)
        ]

    def grids(self) -> dict[str, list[list[float | None]]]:
        """``alpha``, attention to the first token: (n_layers, heads), None without attention."""
        heads = 1 + max(head.head for head in self.heads)
        alpha: list[list[float | None]] = [[None] * heads for _ in range(self.n_layers)]
        for head in self.heads:
            alpha[head.layer][head.head] = head.alpha
        return {"alpha": alpha}

    def summary(self) -> str:
        """One plain sentence; layers count from 0."""
        rates = ", ".join(f"{value:.2f} at eps {eps}" for eps, value in self.overall.items())
        text = f"{self.run.subject}: Sink^eps (Gu et al., T = {self.t}) of the first token {rates}"
        if self.uniform > min(map(float, self.overall)):
            text += f" (short texts: uniform attention alone gives {self.uniform:.2f})"
        which = "the first token" if self.onset_of == "first" else "other massive tokens"
        if self.onset_layer is None:
            return f"{text}; no layer passes {self.onset_rule} on {which}."
        text += f"; sinks on {which} begin at layer {self.onset_layer}"
        if len(self.spans) > 1:
            text += f" (layers {', '.join(map(str, self.spans))})"
        if self.me_layer is None:
            return f"{text}, and there is no ME Layer."
        gap = self.onset_layer - self.me_layer
        place = "in it" if not gap else f"{counted(abs(gap), 'layer')} "
        place += "" if not gap else ("after it" if gap > 0 else "before it")
        return f"{text}, {place} (ME Layer {self.me_layer}, counted from 0)."
