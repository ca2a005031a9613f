"""WeightScan: what the weights say of where a massive activation is made and erased.

Where the files are here, a few first tokens are run as well, to see whether that happens.

Layers count from 0, at the block output. A dim is a coordinate of the residual stream and the row
of a down projection, a neuron its column: ``down_proj.weight[dim, neuron]`` is the entry that
writes it, a candidate super weight.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from melens.protocols import JsonObject
from melens.provenance import RunInfo
from melens.results.base import Part, Result, added_later

Role = Literal["emerge", "erase", "other"]
Sign = Literal[-1, 1]
Why = Literal["bos", "chat", "given", "sample"]
"""Why a token was tried: it begins texts, begins chats, was asked for, was drawn."""
Path = Literal["gated", "plain", "after a norm"]


class Needs(Part):
    """The normalised input at which a neuron is at its ceiling, its largest coordinates."""

    dims: tuple[int, ...]
    weights: tuple[float, ...]
    """Of the unit vector; the norm's output has length sqrt(d_model)."""
    share: float
    """Of the unit vector's square that these coordinates hold."""


class Candidate(Part):
    """A neuron that stands out among those of its layer, by what it could write."""

    layer: int
    neuron: int
    expert: str | None = None
    """Which expert's neuron it is; None where every token goes through the same FFN."""
    dim: int
    """The residual coordinate that it can move most."""
    ceiling: float
    """The most it can write there, residual units."""
    against: float
    """The most it can write there with the other sign."""
    ratio_to_median: float
    """Ceiling over that of its layer's median neuron."""
    cosine: float | None
    """Between gate and up row, the norm's gain included; None where there is no gate."""
    sign: Sign
    """Of the write at the ceiling."""
    value: float
    """Its down entry, W_down[dim, neuron]."""
    role: Role = "other"
    needs: Needs

    @property
    def at(self) -> tuple[int, int, int]:
        """Layer, row and column of the entry: the coordinates of a super weight."""
        return (self.layer, self.dim, self.neuron)


class LayerCeiling(Part):
    """A layer's highest neuron, or why nothing is said of it."""

    layer: int
    covered: bool
    reason: str | None = None
    path: Path | None = None
    """Which bound it is."""
    neurons: int = 0
    median: float | None = None
    """Ceiling of the median neuron, of those in the layer that can write at all."""
    ceiling: float | None = None
    ratio_to_median: float | None = None
    neuron: int | None = None
    expert: str | None = None
    dim: int | None = None
    sign: Sign | None = None
    whole: float | None = None
    """Where a norm follows the FFN: the most that the whole FFN can write into any coordinate."""
    whole_dim: int | None = None

    @model_validator(mode="after")
    def _said_or_not(self) -> LayerCeiling:
        numbers = (
            self.path,
            self.median,
            self.ceiling,
            self.ratio_to_median,
            self.neuron,
            self.dim,
            self.sign,
        )
        if any((value is None) == self.covered for value in (*numbers,)):
            raise ValueError("a covered layer has every number, another has none")
        if (self.reason is None) != self.covered:
            raise ValueError("a layer that is not covered says why")
        return self


class Allowed(Part):
    """What the ceilings allow in the coordinate that stands out, and what massive needs."""

    layer: int
    """The layer that the ceilings point at; the predicted ME Layer, unless that was denied."""
    dim: int
    neuron: int
    """The neuron with the highest ceiling there."""
    expert: str | None = None
    size: float
    """Its ceiling: the largest |x| that it alone can add to the residual, residual units."""
    highest: float
    """The highest ceiling of one such neuron at any layer of the same stage."""
    highest_layer: int
    neurons: int
    """How many stand out and can write this coordinate in this stage."""
    together: float
    """Sum of the ceilings of those neurons; of a layer whose FFN a norm follows the whole FFN's, if
    larger. No bound: neurons that do not stand out, attention and biases write as well."""
    last_layer: int | None = added_later()
    """The last layer of the stage in which a neuron stands out; None = ``highest_layer``."""
    needed: float
    """|x| above which an activation can be massive (Sun et al. 2024: 100)."""

    @property
    def is_enough(self) -> bool:
        """Whether these neurons could make a massive activation at all."""
        return self.together > self.needed


class TriedToken(Part):
    """A first token that was run, and how far it gets in the predicted coordinates."""

    token_id: int
    token: str
    why: Why
    value: float
    """Its largest entry in a predicted coordinate, from the predicted layer on; signed."""
    dim: int
    layer: int
    """Where that is."""
    times: float | None
    """|value| over the median |x| of the same token's entries there."""
    largest: float
    """The largest |x| of all its coordinates at those layers."""


class TokensTried(Part):
    """What first tokens reach where the ceilings stand out: each alone at position 0."""

    layer: int
    """The layer that the ceilings point at."""
    until: int
    """The last layer that was run: that of the highest ceiling."""
    needed: float
    """|x| above which an activation can be massive."""
    reached: int
    """How many of the tokens get above that in a predicted coordinate."""
    tokens: tuple[TriedToken, ...]

    @model_validator(mode="after")
    def _counted(self) -> TokensTried:
        over = sum(abs(token.value) > self.needed for token in self.tokens)
        if not self.tokens or over != self.reached:
            raise ValueError("reached must be how many tokens get above what is needed")
        return self

    @property
    def farthest(self) -> TriedToken:
        """The token that gets farthest."""
        return max(self.tokens, key=lambda token: abs(token.value))

    def said(self) -> str:
        """As a sentence."""
        top, n = self.farthest, len(self.tokens)
        tried = "1 first token" if n == 1 else f"{n} first tokens"
        if not self.reached:
            return f"no first token of {n} tried gets above {abs(top.value):,.4g} there"
        return (
            f"of {tried} tried, {self.reached} reach{'es' if self.reached == 1 else ''} it "
            f"(largest {top.value:,.0f} at layer {top.layer}, token {top.token!r})"
        )


class WeightScan(Result):
    """Ceilings by layer, the layers that they predict, and what first tokens do there."""

    schema_id: ClassVar[str] = "melens/scan/1"

    kind: Literal["scan"] = "scan"
    schema_: Literal["melens/scan/1"] = Field(default="melens/scan/1", alias="schema")
    n_layers: int
    d_model: int
    me_layer: int | None
    """Predicted ME Layer; None where none is predicted: nothing stands out, what does is too small
    to be massive, or no first token gets there.
    """
    erase_layer: int | None
    dims: tuple[int, ...]
    """Coordinates that the prediction is about, the strongest first."""
    confidence: float = Field(ge=0, le=1)
    """How far the emergence stands out, in [0, 1]; not a probability."""
    rule: str
    """How the prediction was made, with its constants."""
    candidates: tuple[Candidate, ...]
    profile: tuple[LayerCeiling, ...]
    covered: bool
    """Whether every layer's FFN has a bound here."""
    leaves_out: tuple[str, ...]
    """What can write into the residual and has no bound here."""
    allowed: Allowed | None = added_later()
    """The size that the ceilings allow; None where nothing stands out."""
    seen: TokensTried | None = added_later()
    """What first tokens reach; None where none were run."""
    unseen: str | None = added_later()
    """Why no first tokens were run."""
    run: RunInfo

    @model_validator(mode="after")
    def _fits_together(self) -> WeightScan:
        """Refuse what no scan can have made; figures and sentences rely on it."""
        if [row.layer for row in self.profile] != list(range(self.n_layers)) or not self.profile:
            raise ValueError("profile must have one row a layer, counted from 0")
        if self.covered != all(row.covered for row in self.profile):
            raise ValueError("covered must be what the profile says")
        layers = (self.me_layer, self.erase_layer)
        if any(layer is not None and not 0 <= layer < self.n_layers for layer in layers):
            raise ValueError(f"layers must be within 0 and {self.n_layers - 1}")
        if (self.me_layer is None) == bool(self.dims):
            raise ValueError("a predicted ME Layer comes with its dimensions")
        if self.erase_layer is not None and (
            self.me_layer is None or self.erase_layer <= self.me_layer
        ):
            raise ValueError("the erase layer comes after an ME Layer")
        if any(
            not 0 <= c.layer < self.n_layers or not 0 <= c.dim < self.d_model
            for c in self.candidates
        ):
            raise ValueError("candidates must lie inside the model")
        return self

    def rows(self) -> list[JsonObject]:
        """One row a layer."""
        return [row.model_dump() for row in self.profile]

    def shown(self) -> list[JsonObject]:
        """The main columns."""
        keep = ("layer", "ceiling", "ratio_to_median", "neuron", "expert", "dim", "sign", "reason")
        return [{key: row[key] for key in keep} for row in self.rows()]

    def summary(self) -> str:
        """Plain sentences; layers count from 0."""
        subject, here = self.run.subject, self.allowed
        if not any(row.covered for row in self.profile):
            return f"{subject}: nothing is said, {self.profile[0].reason}."
        if self.me_layer is None:
            if here is None:
                return f"{subject}: the weights predict no ME Layer.{self._unrun()}"
            return f"{subject}: {self._denied(here)}."
        text = (
            f"{subject}: the weights predict ME Layer {self.me_layer} of "
            f"0..{self.n_layers - 1}, dim {', '.join(map(str, self.dims))}"
        )
        if self.erase_layer is not None:
            text += f", and erasure at layer {self.erase_layer}"
        text += f" (layers count from 0; confidence that it stands out: {self.confidence:.2f})"
        if here is not None:
            text += f"; one neuron can write {here.size:,.0f} there, {here.needed:g} is needed"
        return f"{text}{self._what_was_seen()}"

    def _denied(self, here: Allowed) -> str:
        """Why what stands out is no ME Layer."""
        where = f"ceilings stand out at layer {here.layer} (from 0), dim {here.dim}"
        if self.seen is not None:
            return (
                f"{where} (one neuron can write {here.size:,.4g}), but {self.seen.said()}: no "
                f"massive activation is predicted (|x| above {here.needed:g})"
            )
        text = f"{where}, but the largest that one neuron can write is {here.highest:,.4g}"
        if here.together > here.highest:
            text += f" ({here.together:,.4g} with the others that stand out there)"
        return f"{text}, too small to be massive ({here.needed:g}): no ME Layer is predicted"

    def _what_was_seen(self) -> str:
        if self.seen is None:
            return f".{self._unrun()}"
        if self.seen.reached:
            return f"; {self.seen.said()}."
        return f"; {self.seen.said()}; another token may, the ceiling is far above."

    def _unrun(self) -> str:
        why = "" if self.unseen is None else f" ({self.unseen})"
        return f" Nothing was run{why}: a ceiling says what can happen, not what does."
