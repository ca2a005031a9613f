"""SuperWeights: single down-projection entries that make a spike, and what removing each costs.

Layers count from 0. A row is a dimension of the residual stream, a column a neuron of the FFN, as
in the (out, in) matrix of a checkpoint's ``down_proj.weight[row, column]``.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from melens.formatting import Interval, counted, with_interval
from melens.protocols import JsonObject
from melens.provenance import RunInfo
from melens.results.base import Part, Result, added_later
from melens.results.known import KnownCheck

Site = Literal["output", "write"]
"""Where the spike was read: the down projection's output, or that after the norm behind it."""
Role = Literal["writes", "erases", "elsewhere"]


class Thresholds(Part):
    """The numbers that the verdicts go by."""

    against_layers: float
    """Times the median of the other layers' largest entries, of input and of output."""
    against_median: float
    """Times the median |x| of the layer's own input and output."""
    least_share: float
    """Share of the spike that the one weight must make."""


class LayerSpikes(Part):
    """One layer of the unedited run: how far its FFN's input and output stand out."""

    layer: int
    input: float
    """Largest |product|: what the down projection reads."""
    input_median: float
    """Median |product| of a sequence, averaged over sequences."""
    output: float
    """Largest |output| of the down projection, before any norm."""
    output_median: float
    write: float | None
    """The same after the norm behind the FFN; None where there is none."""
    write_median: float | None
    row: int
    column: int
    """Of the largest product at the token where the output (the write) is largest."""
    position: int
    token: str
    share: float
    """What that one weight makes of the output there, signed; 1 = all of it."""
    expert: int | None = added_later()
    """The routed expert that the column is of; None where the layer's FFN is dense."""
    verdict: str
    """"candidate", or the first condition that fails."""


class SuperWeight(Part):
    """One entry of a down projection that makes a spike, in the order in which it was found.

    Of a layer with routed experts it is an entry of one expert's own down projection.

    Whether it is a super weight is for :meth:`SuperWeights.is_super` to say: its cost decides.
    """

    layer: int
    expert: int | None = added_later()
    """Among the layer's routed experts, from 0; None where the FFN is dense."""
    row: int
    column: int
    value: float
    found_in: int
    """The pass that found it, from 1; in later passes the earlier ones are removed already."""
    site: Site
    input_spike: float
    """The column's product at the token, signed."""
    output_spike: float
    """The row's entry of the down projection's output there, before any norm.

    Of routed experts: of their weighted sum; where a norm follows, of all that the norm reads.
    """
    write_spike: float | None
    """The same entry after the norm behind the FFN; None where there is none."""
    share: float
    """input_spike x value / output_spike; of an expert times ``router_weight``."""
    router_weight: float | None = added_later()
    """What the router multiplies the expert's write by at the token; None where it is dense."""
    sequence: int
    position: int
    token_id: int
    token: str
    residual_before: float
    """The coordinate in the residual that enters the block, in the same pass."""
    role: Role | None
    """None where no ME Layer was given."""
    loss_without: float
    """Mean loss with this weight alone removed, nats a token."""
    loss_delta: float
    """loss_without - base_loss, paired by sequence."""
    interval: Interval | None
    """95 % bootstrap over sequences; None where it says nothing (one sequence, no change)."""
    neuron_loss_delta: float
    """The same for the whole neuron (its column): more is removed, yet it can cost less."""
    neuron_interval: Interval | None

    @property
    def at(self) -> tuple[int, int, int]:
        """(layer, row, column); of which expert, ``expert`` says."""
        return self.layer, self.row, self.column

    @property
    def name(self) -> str:
        """The place in words; layers count from 0."""
        of = "" if self.expert is None else f" expert {self.expert}"
        return f"layer {self.layer}{of} row {self.row} column {self.column}"


class Removal(Part):
    """Several weights removed together."""

    weights: tuple[tuple[int, int, int], ...]
    """(layer, row, column)."""
    experts: tuple[int | None, ...] = added_later(())
    """Which expert each is of, None of a dense FFN; empty where all are of dense FFNs."""
    values: tuple[float, ...]
    loss_without: float
    loss_delta: float
    interval: Interval | None


class SuperWeights(Result):
    """The super weights of one model by Yu et al.'s activation spikes, and their damage."""

    schema_id: ClassVar[str] = "melens/super-weights/1"

    kind: Literal["super-weights"] = "super-weights"
    schema_: Literal["melens/super-weights/1"] = Field(
        default="melens/super-weights/1", alias="schema"
    )
    n_layers: int
    super_weights: tuple[SuperWeight, ...]
    base_loss: float
    """Mean over sequences of the mean next-token loss, nats a token, nothing removed."""
    together: Removal | None
    """All of them removed; None where none was found."""
    control: Removal | None
    """As many others removed together: entries of the same matrices, of the nearest size."""
    passes: int
    stopped: Literal["no spike left", "most"]
    profile: tuple[LayerSpikes, ...]
    missing: tuple[str, ...]
    """Layers that were not looked at, with the reason."""
    rule: str
    thresholds: Thresholds
    known: KnownCheck | None = None
    """Held against published coordinates, where that was asked for."""
    run: RunInfo

    @model_validator(mode="after")
    def _fits_together(self) -> SuperWeights:
        """Refuse what no run can have made."""
        layers = [row.layer for row in self.profile]
        if sorted(set(layers)) != layers or any(not 0 <= i < self.n_layers for i in layers):
            raise ValueError("the profile must have layers in order, from 0 to n_layers - 1")
        places = [(*weight.at, weight.expert) for weight in self.super_weights]
        if len(set(places)) != len(places) or not {at[0] for at in places} <= set(layers):
            raise ValueError("super weights must differ, and be of layers in the profile")
        groups = [group for group in (self.together, self.control) if group is not None]
        if any(len(group.experts) not in (0, len(places)) for group in groups):
            raise ValueError("experts must be said of every weight, or of none")
        if any(len(group.weights) != len(places) for group in groups) or (
            bool(places) != (len(groups) == 2)
        ):
            raise ValueError("together and control must be there for as many weights as were found")
        for damage in (*self.super_weights, *groups):
            apart = damage.loss_without - self.base_loss - damage.loss_delta
            if not math.isclose(apart, 0.0, abs_tol=1e-6 * max(1.0, abs(damage.loss_without))):
                raise ValueError("loss_delta must be loss_without - base_loss")
        return self

    def is_super(self, weight: SuperWeight) -> bool:
        """Whether removing a weight hurts, and more than its control; else it is a large weight.

        The interval of its loss change lies above 0 and above the control's, which is of as many
        other weights as were found, removed together. Without intervals (fewer than 5 sequences)
        the changes themselves are compared.
        """
        least = weight.loss_delta if weight.interval is None else weight.interval[0]
        others = 0.0
        if self.control is not None:
            inside = self.control.interval
            others = self.control.loss_delta if inside is None else inside[1]
        return least > max(0.0, others)

    @property
    def supers(self) -> tuple[SuperWeight, ...]:
        """Those found whose removal hurts more than the control."""
        return tuple(weight for weight in self.super_weights if self.is_super(weight))

    @property
    def large(self) -> tuple[SuperWeight, ...]:
        """Those found that spike, and whose removal costs no more than the control."""
        return tuple(weight for weight in self.super_weights if not self.is_super(weight))

    def kind_of(self, weight: SuperWeight) -> str:
        """``super`` or ``large``."""
        return "super" if self.is_super(weight) else "large"

    def rows(self) -> list[JsonObject]:
        """One row a weight that spikes; together and control last."""
        routed = any(w.expert is not None for w in self.super_weights)
        made = [
            {
                "is": self.kind_of(w),
                **w.model_dump(),
                **({"expert": w.expert, "router_weight": w.router_weight} if routed else {}),
            }
            for w in self.super_weights
        ]
        groups = {"together": self.together, "control": self.control}
        keys = ("loss_without", "loss_delta", "interval")
        return [{"weights": "one", **row} for row in made] + [
            {"weights": name, **{key: getattr(group, key) for key in keys}}
            for name, group in groups.items()
            if group is not None
        ]

    def shown(self) -> list[JsonObject]:
        """The main columns."""
        keep = (
            "weights",
            "is",
            "layer",
            "row",
            "column",
            "value",
            "share",
            "position",
            "token",
            "role",
            "loss_without",
            "loss_delta",
            "interval",
            "neuron_loss_delta",
        )
        if any(w.expert is not None for w in self.super_weights):
            keep = (*keep[:3], "expert", *keep[3:])
        return [{key: row.get(key) for key in keep} for row in self.rows()]

    def summary(self) -> str:
        """Plain sentences; layers count from 0."""
        if self.together is None or self.control is None:
            return f"{self.run.subject}: no super weight ({self.rule}).{self._held()}"
        worst = max(self.super_weights, key=lambda weight: weight.loss_delta)
        n = len(self.super_weights)
        text = (
            f"{self.run.subject}: {self._counted()} "
            f"({'no spike left' if self.stopped != 'most' else 'stopped at the most asked for'}, "
            f"pass {self.passes}). Mean loss {self.base_loss:.3f} nats a token; removing "
            f"{'the costliest' if worst.loss_delta > 0 else 'none raises it: the nearest'}, "
            f"{worst.name}, changes it by "
            f"{with_interval(worst.loss_delta, worst.interval, '+.3g')} (its whole neuron: "
            f"{worst.neuron_loss_delta:+.3g})"
        )
        if n > 1:
            cost = with_interval(self.together.loss_delta, self.together.interval, "+.3g")
            text += f", all {n} by {cost}"
        control = with_interval(self.control.loss_delta, self.control.interval, "+.3g")
        others = "another weight" if n == 1 else f"{n} other weights"
        text += f"; {others} of the nearest size by {control} (layers count from 0)."
        if self.large:
            text += " A super weight is one whose removal costs more than that of the others."
        if behind := sum(weight.site == "write" for weight in self.super_weights):
            text += (
                f" {behind} of {n} only spike after the norm behind the FFN, which the published"
            )
            text += " method does not look at."
        return text + self._held()

    def _counted(self) -> str:
        """How many spike, by what their removal costs."""
        found = {"super": len(self.supers), "large": len(self.large)}
        named = [counted(n, f"{kind} weight") for kind, n in found.items() if n]
        return ("" if found["super"] else "no super weight, ") + " and ".join(named)

    def _held(self) -> str:
        return f" Published coordinates: {self.known.summary()}" if self.known else ""
