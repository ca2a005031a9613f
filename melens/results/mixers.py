"""Mixers: what each kind of token mixer does to the sink token. Layers count from 0."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from melens.formatting import interval_text
from melens.protocols import JsonObject
from melens.provenance import RunInfo
from melens.results.base import Part, Result

FULL = "full attention"
SET_APART = 3.0
"""Times the median token norm from which a token is called set apart: nine times the energy. The
first token of 150 tiny random models has 0.9 to 1.9 times, of SmolLM2 4.9 times after layer 1."""
SUN = 100.0
"""|x| that Sun et al.'s rule asks of a massive activation."""


class StateWrite(Part):
    """What one token wrote into a recurrent state, and what later tokens read of it."""

    norm: float
    """Frobenius norm of the write, all heads together, in the state's units."""
    rank: float | None
    """Effective rank of the write, mean over heads: 1 = one outer product k v'; None where the
    state is not a matrix."""
    left: float
    """Share of the write's norm that is still in the state ``steps`` tokens later."""
    read: float
    """||mixer output - output without the write|| / ||output||, mean over those later tokens."""


class State(Part):
    """A linear-attention or state-space layer's state."""

    steps: int
    """Later tokens that were followed."""
    sink: StateWrite
    other: StateWrite
    """The control: the token after the sink token."""


class Gate(Part):
    """The mean output gate of attention: what its output is multiplied by."""

    sink: float
    others: float


class MixerRow(Part):
    """One layer. Norms in residual units, means over texts."""

    layer: int
    kinds: tuple[str, ...]
    """full attention, window attention, linear attention, state space, convolution ...; two where
    they run in parallel, none where a block only has an FFN."""
    norm: float
    """The sink token's, at the block output."""
    median_norm: float
    """The median of the other tokens'."""
    largest: float
    """Largest |x| of the sink token, over texts."""
    write: float | None
    """Norm of what the mixer adds to the sink token; None where it cannot be told."""
    median_write: float | None
    """The median of the other tokens' writes."""
    write_share: float | None
    """The mixer's share of the sink token's vector at ``peak_layer``, signed: after the peak, what
    it adds to that direction or takes from it; None where the block's parts cannot be told apart.
    """
    rest_share: float
    """The same of everything else that the block adds; of all of it where ``write_share`` is None.
    """
    gate: Gate | None
    state: State | None

    @property
    def kind(self) -> str:
        """Its kinds as one name."""
        return " + ".join(self.kinds) or "no mixer"


class Rhythm(Part):
    """A measure of the spikes before full attention, beside its control."""

    value: float
    control: float
    """Mean over other placements of the full-attention layers, as far apart."""
    interval: tuple[float, float]
    """The smallest and the largest of these."""
    shifts: int
    """How many placements."""


class Mixers(Result):
    """How the sink token is written, kept and read by each kind of mixer."""

    schema_id: ClassVar[str] = "melens/mixers/1"

    kind: Literal["mixers"] = "mixers"
    schema_: Literal["melens/mixers/1"] = Field(default="melens/mixers/1", alias="schema")
    n_layers: int
    me_layer: int | None
    """What ``locate`` says, by Sun et al.'s absolute rule."""
    token_id: int
    token: str
    position: int
    """The sink token of most texts, and where it stands."""
    texts: int
    texts_with_it: int
    peak_layer: int
    """Where its norm is largest, the final layers left out; shares are of its vector there."""
    embedding_share: float
    """The embedding's share; with all others up to ``peak_layer`` it sums to 1."""
    texts_massive: int
    """Texts whose sink token is a massive token, by ``locate``'s rule."""
    chosen_by: str
    """How the sink token of a text was chosen."""
    full_layers: tuple[int, ...]
    alignment: Rhythm | None
    """Sink-spike alignment."""
    retention: Rhythm | None
    """Inter-spike retention."""
    layers: tuple[MixerRow, ...]
    missing: tuple[str, ...]
    run: RunInfo

    @model_validator(mode="after")
    def _fits_together(self) -> Mixers:
        """Refuse what no run can have made."""
        if [row.layer for row in self.layers] != list(range(self.n_layers)) or not self.layers:
            raise ValueError("layers must have one row a layer, counted from 0")
        if any(not 0 <= layer < self.n_layers for layer in self.full_layers):
            raise ValueError("full_layers must be within the layers")
        return self

    @property
    def tallest(self) -> MixerRow:
        """The layer where the sink token is furthest above the median token."""
        return max(self.layers, key=lambda row: row.norm / max(row.median_norm, 1e-30))

    @property
    def is_set_apart(self) -> bool:
        """The scale-free answer: somewhere its norm is several times the median token's."""
        return self.tallest.norm >= SET_APART * self.tallest.median_norm

    def by_kind(self) -> list[JsonObject]:
        """One row a kind of mixer: layers up to the peak, and shares of the vector there."""
        before = self.layers[: self.peak_layer + 1]
        made: list[JsonObject] = []
        for kind in dict.fromkeys(row.kind for row in before):
            rows = [row for row in before if row.kind == kind]
            made.append(
                {
                    "kind": kind,
                    "layers up to the peak": len(rows),
                    "mixer's share": _sum([row.write_share for row in rows]),
                    "rest of the block": sum(row.rest_share for row in rows),
                }
            )
        return made

    def rows(self) -> list[JsonObject]:
        """One row a layer."""
        return [row.model_dump() | {"kinds": row.kind} for row in self.layers]

    def shown(self) -> list[JsonObject]:
        """The main columns."""
        return [
            {
                "layer": row.layer,
                "mixer": row.kind,
                "norm": row.norm,
                "x median": row.norm / max(row.median_norm, 1e-30),
                "largest |x|": row.largest,
                "write": row.write,
                "write share": row.write_share,
            }
            | (self._gate(row) if self._has("gate") else {})
            | (self._read(row) if self._has("state") else {})
            for row in self.layers
        ]

    def _gate(self, row: MixerRow) -> JsonObject:
        return {"gate": row.gate and row.gate.sink, "others' gate": row.gate and row.gate.others}

    def _read(self, row: MixerRow) -> JsonObject:
        state = row.state
        return {
            "read of state": state and state.sink.read,
            "next token's": state and state.other.read,
        }

    def _has(self, name: str) -> bool:
        return any(getattr(row, name) is not None for row in self.layers)

    def summary(self) -> str:
        """Plain sentences; layers count from 0 at the block output."""
        return f"{self.run.subject}: {self._size()}. {self._spikes()}"

    def _size(self) -> str:
        most, peak = max(row.largest for row in self.layers), self.tallest
        token = f"token {self.token!r} at position {self.position}"
        ratio = f"{peak.norm / max(peak.median_norm, 1e-30):.1f} x the median token norm at most"
        if self.texts_massive:
            held = f"in {self.texts_massive} of {self.texts} texts the sink token is massive"
            return (
                f"{held}, most often {token}: |x| reaches {most:,.0f}; {ratio}, layer {peak.layer}"
            )
        if self.me_layer is not None:
            return f"{token} is not the massive token ({ratio}, layer {peak.layer})"
        rule = f"|x| reaches {most:,.3g}, Sun et al.'s rule asks for {SUN:.0f}"
        if not self.is_set_apart:
            return f"{token} is not set apart ({ratio}, layer {peak.layer}; {rule})"
        return f"{token} is small but set apart: {ratio}, layer {peak.layer} ({rule})"

    def _spikes(self) -> str:
        if len(self.full_layers) == self.n_layers:
            return "Every layer has full attention, so peaks before such layers are not measured."
        if not self.full_layers:
            return "No layer has full attention, so peaks before such layers are not measured."
        text = f"{len(self.full_layers)} of {self.n_layers} layers have full attention (from 0). "
        if self.alignment is None:
            text += "Too few layers lie between them to tell peaks. "
        else:
            text += f"The norm peaks right before {_beside(self.alignment)}. "
        if self.retention is not None:
            text += "Of the smaller of two peaks there stays between them "
            text += f"{_beside(self.retention, of='')}."
        return text.strip()


def _sum(shares: list[float | None]) -> float | None:
    """None where any is not known."""
    known = [share for share in shares if share is not None]
    return sum(known) if len(known) == len(shares) else None


def _beside(found: Rhythm, *, of: str = " of them") -> str:
    """A value with its control."""
    low, high = found.interval
    better = "more than" if found.value > high else "less than" if found.value < low else "as"
    return (
        f"{found.value:.0%}{of} ({better} with these layers elsewhere: {found.control:.0%}, "
        f"{interval_text(found.interval, '.0%')}, {found.shifts} placements)"
    )
