"""Isolation: which parameters of the ME Layer make the massive activation. Layers count from 0."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from melens.formatting import Interval, within
from melens.protocols import JsonObject
from melens.provenance import RunInfo
from melens.results.base import Part, Result, added_later

# Intervals are 95 %, bootstrapped over sequences, those of coordinates over distinct inputs up to
# the massive token; None where all observations are the same one.
ADDS_UP = 1e-6


class Cell(Part):
    """One cell of the 2 x 2, or one control: what the texts show under an edit."""

    coordinate: float
    """Massive coordinate at the peak, mean over distinct inputs up to the massive token."""
    left: float
    """Share of the unedited coordinate."""
    left_interval: Interval | None
    sink_rate: float
    """Share of (sequence, layer after the ME Layer, head) with alpha > 0.3 on that token."""
    sink_interval: Interval | None
    loss: float
    """Next-token loss in nats a token, mean over sequences."""
    loss_delta: float
    """Against the unedited run, paired."""
    loss_interval: Interval | None
    """Of ``loss_delta``."""


class Interaction(Part):
    """What both edits do together beyond each alone: x11 - x10 - x01 + x00."""

    coordinate: float
    """On the additive scale, in residual units: misleading where the FFN multiplies."""
    coordinate_interval: Interval | None
    log_coordinate: float | None
    """The same of ln |c|: 0 where the edits multiply; None where a coordinate is 0."""
    log_interval: Interval | None
    sink_rate: float
    sink_interval: Interval | None
    loss: float
    loss_interval: Interval | None


class Factorial(Part):
    """Norm {kept, flattened} x FFN {kept, edited}, on the massive tokens only."""

    norm: str
    """Which norm was flattened (alpha = 0)."""
    ffn_edit: str
    """What was done to the FFN."""
    kept_kept: Cell
    flat_kept: Cell
    kept_edited: Cell
    flat_edited: Cell
    interaction: Interaction


def cells(factorial: Factorial) -> list[JsonObject]:
    """The four cells of a 2 x 2 as rows."""
    made: list[JsonObject] = []
    for name in ("kept_kept", "flat_kept", "kept_edited", "flat_edited"):
        norm, ffn = name.split("_")
        made.append({"norm": norm, "ffn": ffn, **getattr(factorial, name).model_dump()})
    return made


class Write(Part):
    """One block's attention or FFN write, dropped (necessity) or put in alone (sufficiency)."""

    layer: int
    part: Literal["attention", "ffn"]
    left: float
    """Massive coordinate at the peak, as a share of the unedited one."""


class Step(Part):
    """One site inside the ME Layer's FFN branch, norms over all its coordinates."""

    site: str
    token: float
    """Norm of the massive token, mean over sequences."""
    median_others: float
    """Median norm of the other real tokens, mean over sequences."""
    ratio: float


class Neuron(Part):
    """One neuron's part in what its layer's FFN writes into the massive dimension."""

    layer: int
    neuron: int
    share: float
    """Of the layer's write; all neurons of a layer (and a bias) sum to 1."""
    gate: float | None
    """After its activation; None where the FFN has no gate."""
    up: float
    product: float
    weight: float
    """Entry (dim, neuron) of the down projection."""
    left: float
    """Share of the coordinate at the peak without this neuron alone."""


PROTECTED_SHARE = 0.1


class RoutedExpert(Part):
    """One expert that the massive token is routed to, and what it writes into the dimension."""

    layer: int
    expert: int
    """Among the routed experts, from 0."""
    weight: float
    """What the router multiplies its write by, at the massive token."""
    share: float
    """Of the layer's FFN write into the massive dimension."""
    neuron: int
    """Its neuron that writes most."""
    neuron_share: float
    """Of the layer's FFN write, too."""
    entry: float
    """Entry (dim, neuron) of its down projection."""
    others: float = Field(ge=0, le=1)
    """Share of ordinary tokens that go to it as well."""
    of_peak: float | None = added_later()
    """What it writes into the massive dimension, over the massive token's value at its peak."""

    @property
    def is_to_protect(self) -> bool:
        """Whether it makes a tenth of its layer's write or more, and of the massive coordinate."""
        little = self.of_peak is not None and abs(self.of_peak) < PROTECTED_SHARE
        return abs(self.share) >= PROTECTED_SHARE and not little


class PrunedExpert(Part):
    """One expert that writes nothing at any token: what the texts show without it."""

    layer: int
    expert: int
    others: float = Field(ge=0, le=1)
    """Share of ordinary tokens that go to it, as in :class:`RoutedExpert`."""
    without: Cell

    @property
    def name(self) -> str:
        """The place in words."""
        return f"expert {self.expert} of layer {self.layer}"


class ExpertDamage(Part):
    """What pruning an expert to protect costs, beside others whose share of tokens is nearest."""

    pruned: PrunedExpert
    controls: tuple[PrunedExpert, ...]
    """Empty where no other expert is used by nearly as many tokens."""

    def sentence(self) -> str:
        """Both losses; layers count from 0."""
        cell = self.pruned.without
        text = (
            f"Without {self.pruned.name} the loss changes by {cell.loss_delta:+.3g}"
            f"{within(cell.loss_interval, '+.3g')} nats a token and {_percent(cell.left)} of the "
            "massive coordinate is left"
        )
        if not self.controls:
            return f"{text}; no other expert is used by nearly as many tokens, to compare with."
        shares = _span([_percent(row.others) for row in self.controls])
        losses = _span([f"{row.without.loss_delta:+.3g}" for row in self.controls])
        one = len(self.controls) == 1
        others = "another one" if one else f"one of {len(self.controls)} others"
        return (
            f"{text}; without {others} used by nearly as many ({shares} of ordinary tokens go to "
            f"{'it' if one else 'them'}, {_percent(self.pruned.others)} to the first) it changes "
            f"by {losses}."
        )


def _span(shown: list[str]) -> str:
    """Numbers in a few words: one, or the least and the largest."""
    found = list(dict.fromkeys(sorted(shown, key=lambda text: float(text.removesuffix(" %")))))
    return found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"


class Decomposition(Part):
    """How one layer's FFN write into the massive dimension comes about."""

    layer: int
    written: float
    """By the FFN, a norm on its write path included; residual units."""
    share: float
    """Of the coordinate at the peak."""
    error: float
    """Sum of the contributions against the write, relative."""
    neurons_for: dict[str, int]
    """Fewest neurons that together make 0.5, 0.9, 0.99 of the write."""


class Direction(Part):
    """The direction in FFN input space that a token must align with to make the coordinate."""

    kind: Literal["quadratic", "linear"]
    eigenvalue: float
    """Write into the massive dimension for a unit input along the direction, gates wide open."""
    concentration: float
    """Its square over the sum of all squared eigenvalues; 1 = one direction says it all."""
    massive: float
    """|cosine| of the massive token's FFN input with it; mean over sequences."""
    others_median: float
    """Over up to 64 ordinary tokens of every sequence."""
    others_max: float
    """The largest |cosine| among them."""
    explained: float
    """What the direction alone predicts of the massive token's write (before a post-norm)."""
    predicted: float
    """What the whole form predicts of it; 1 = the form is exact for this token."""


class Gains(Part):
    """What the gain of one norm does to the write, dimension by dimension."""

    norm: str
    mean: float
    at_dim: float
    """Gain at the massive dimension."""
    left: tuple[float, ...]
    """By residual dimension: share of the FFN's write into the massive dimension that is left when
    this dimension's gain alone is set to the mean."""
    top: tuple[int, ...]
    """The dimensions that change it most."""
    gains: tuple[float, ...]


class NormEdit(Part):
    """Edits of one norm around the FFN, on the coordinate alone."""

    norm: str
    flat: float
    """Share left with alpha 0; ``half`` with 0.5."""
    half: float
    ones: float
    """With every gain 1."""
    shuffled: tuple[float, ...]
    """Control: the same gains in other places, one a seed."""


class LayerControl(Part):
    """The same edits at another layer."""

    layer: int
    flat: Cell | None
    """None where the layer has no such norm."""
    edited: Cell | None
    """None where the layer's FFN has no neurons to edit."""


class Controls(Part):
    """What every claim has to be compared with."""

    layers: tuple[LayerControl, ...]
    neurons: tuple[float, ...]
    """Share of the coordinate left without as many other neurons, of like down-projection norm."""
    neurons_loss: Cell | None
    """The first of these draws, on the texts."""
    shuffled: Cell | None
    """The norm's gains shuffled (seed 0), on the texts."""


class EditedLayer(Part):
    """What edits at one layer do, and their controls; the fields as in :class:`Isolation`."""

    layer: int
    factorial: Factorial
    norms: tuple[NormEdit, ...]
    path: tuple[Step, ...]
    neurons_for: dict[str, int]
    direction: Direction | None
    gains: Gains | None
    controls: Controls


class Isolation(Result):
    """The cause of the massive activation, by edits at one layer and their controls."""

    schema_id: ClassVar[str] = "melens/isolate/1"

    kind: Literal["isolate"] = "isolate"
    schema_: Literal["melens/isolate/1"] = Field(default="melens/isolate/1", alias="schema")
    layer: int
    """The layer that was edited: the ME Layer, unless another was asked for."""
    steps: tuple[EditedLayer, ...] = added_later(())
    """The same edits at the emergence's other steps; empty where it has one, where a layer was
    asked for, and in results of older versions.
    """
    me_layer: int
    main_layer: int | None = added_later()
    """The step that adds most; older results do not say it."""
    peak_layer: int
    dim: int
    coordinate: float
    """Massive coordinate of the unedited run at the peak layer."""
    n_layers: int
    sequences: int
    sequences_massive: int
    observations: int
    """Distinct inputs up to the massive token: with a fixed first token, one."""
    observations_used: int
    """Of these, how many the single-token measures (necessity, neurons, norms, ...) ran on."""
    factorial: Factorial
    norms: tuple[NormEdit, ...]
    necessity: tuple[Write, ...]
    sufficiency: tuple[Write, ...]
    ordinary: float | None
    """What the ordinary tokens that ``sufficiency`` writes into have of the coordinate by
    themselves, as a share; None without any."""
    path: tuple[Step, ...]
    decompositions: tuple[Decomposition, ...]
    neurons: tuple[Neuron, ...]
    neurons_for: dict[str, int]
    experts: tuple[RoutedExpert, ...] = added_later(())
    """Those that a massive token is routed to, layer by layer; the largest share first."""
    pruned_experts: tuple[ExpertDamage, ...] = added_later(())
    """At most three of ``experts_to_protect``, those that write most; each pruned alone."""
    direction: Direction | None
    gains: Gains | None
    controls: Controls
    missing: tuple[str, ...]
    """What could not be measured on this model, and why."""
    run: RunInfo

    @property
    def experts_to_protect(self) -> tuple[tuple[int, int], ...]:
        """(layer, expert) of every expert that makes a tenth or more of its layer's write and of
        the massive coordinate.
        """  # noqa: D205
        return tuple((row.layer, row.expert) for row in self.experts if row.is_to_protect)

    @model_validator(mode="after")
    def _fits_together(self) -> Isolation:
        """Refuse what no run can have made."""
        layers = [self.peak_layer, *(row.layer for row in self.necessity)]
        layers += [row.layer for row in (*self.sufficiency, *self.neurons)]
        layers += [row.layer for row in (*self.edited, *self.controls.layers)]
        layers += [
            row.layer for damage in self.pruned_experts for row in (damage.pruned, *damage.controls)
        ]
        if any(not 0 <= layer < self.n_layers for layer in layers):
            raise ValueError(f"layers must be within 0 and {self.n_layers - 1}")
        for edited in self.edited:
            _check_interaction(edited.factorial)
        return self

    @property
    def edited(self) -> tuple[EditedLayer, ...]:
        """Every edited layer, the ME Layer (or the one that was asked for) first."""
        here = {name: getattr(self, name) for name in EditedLayer.model_fields}
        return (EditedLayer.model_construct(**here), *self.steps)

    def role(self, layer: int) -> str:
        """A layer by its number and what it is in the emergence."""
        if layer == self.me_layer:
            return f"layer {layer} (the ME Layer)"
        if layer == self.main_layer:
            return f"layer {layer} (the main step)"
        further = layer in (step.layer for step in self.steps)
        return f"layer {layer}" + (" (another step)" if further else "")

    def rows(self) -> list[JsonObject]:
        """The 2 x 2 of the first edited layer, one row a cell; then one row a pruned expert."""
        made = cells(self.factorial)
        for damage in self.pruned_experts:
            made += [
                {
                    "norm": "kept",
                    "ffn": f"without {row.name}{'' if row is damage.pruned else ' (control)'}",
                    **row.without.model_dump(),
                }
                for row in (damage.pruned, *damage.controls)
            ]
        return made

    def least(self, writes: tuple[Write, ...]) -> Write | None:
        """The write without which least is left."""
        return min(writes, key=lambda write: abs(write.left), default=None)

    def _at(self, edited: EditedLayer) -> str:
        """What the edits of one layer leave, and its neurons."""
        f = edited.factorial
        text = (
            f"{_percent(f.flat_kept.left)} is left with the gain of {f.norm} flattened at "
            f"{self.role(edited.layer)}, {_percent(f.kept_edited.left)} with {f.ffn_edit}, "
            f"{_percent(f.flat_edited.left)} with both"
        )
        shares = ", ".join(
            f"{neuron.neuron} ({_percent(neuron.share)})"
            for neuron in self.neurons
            if neuron.layer == edited.layer
        )
        return text + (f"; its neurons: {shares}" if shares else "")

    def summary(self) -> str:
        """One plain sentence; layers count from 0."""
        text = (
            f"{self.run.subject}: of the massive coordinate {self.coordinate:,.0f} (dimension "
            f"{self.dim}), "
        )
        text += "; ".join(self._at(edited) for edited in self.edited)
        if (found := self.least(self.necessity)) is not None:
            text += (
                f"; least is left without the {found.part} write of layer {found.layer} "
                f"({_percent(found.left)})"
            )
        text = f"{text} (layers count from 0)."
        return text if not self.pruned_experts else f"{text} {self.pruned_experts[0].sentence()}"


def _percent(share: float) -> str:
    digits = 0 if abs(share) >= 0.1 or not math.isfinite(share) else 1
    return f"{100 * share:z.{digits}f} %"


def _check_interaction(f: Factorial) -> None:
    """Refuse what no run can have made."""
    for name in ("coordinate", "sink_rate", "loss"):
        both, flat, edited, none = (
            getattr(cell, name) for cell in (f.flat_edited, f.flat_kept, f.kept_edited, f.kept_kept)
        )
        made, scale = both - flat - edited + none, max(map(abs, (both, flat, edited, none, 1)))
        if abs(made - getattr(f.interaction, name)) > ADDS_UP * scale:
            raise ValueError(f"the interaction of {name} is not x11 - x10 - x01 + x00")
