"""Tuning: which settings of the mask were tried, and whether any improves the model."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from melens.formatting import Interval, interval_text, with_interval
from melens.protocols import JsonObject
from melens.provenance import RunInfo
from melens.results.base import Part, Result
from melens.results.edit import Edit
from melens.results.evaluation import RESOLUTION

Role = Literal["candidate", "control"]


class Trial(Part):
    """One setting in the race, on the development items that it was run on."""

    edit: Edit
    role: Role
    items: int
    value: float
    delta: float
    """Edited minus unedited on the same items, weighted mean."""
    interval: Interval | None
    """95 % bootstrap over items, for this setting alone: the race looks at many."""
    energy: float | None
    """Masked share of the token's squared norm at the attention input, 0 to 1, mean over items."""
    stopped_after: int | None
    """The rung, from 1, after which it lost; None = it ran to the end of the race."""


class Confirmed(Part):
    """One setting on the held-out items."""

    edit: Edit
    role: Role
    items: int
    value: float
    delta: float
    interval: Interval | None
    """95 % bootstrap over items, uncorrected."""
    corrected: Interval | None
    """Widened by Bonferroni for the candidates confirmed; None for controls, and where items are
    too few or equal."""
    energy: float | None
    development: float | None
    """Its delta in the race; None for controls that were made from the best candidate."""
    optimism: float | None
    """development - delta: what being chosen flatters."""

    def found(self, sign: int) -> bool:
        """Whether this candidate's corrected interval lies on the better side, and further from
        zero than rounding reaches; ``sign`` as :attr:`Tuning.sign`.
        """  # noqa: D205
        least = RESOLUTION * abs(self.value - self.delta)
        return self.role == "candidate" and _beyond(self.corrected, sign, least)


class Margin(Part):
    """The best setting minus the control that does best, on the same held-out items."""

    control: Edit
    delta: float
    interval: Interval | None
    """95 % bootstrap, paired."""


class Split(Part):
    """Which items were searched on, and which were only confirmed on."""

    development: tuple[str, ...]
    """Ids, in the order in which the race showed them."""
    held_out: tuple[str, ...]
    seed: int
    share: float
    """Of the items, held out."""
    repeated: int
    """Items left out because another has the same tokens."""


class Spent(Part):
    """The budget; an evaluation is one edited setting on one item."""

    evaluations: int | None
    """Asked for, or None."""
    seconds: float | None
    """Asked for, or None."""
    planned: int
    """Evaluations that the budget was taken to be."""
    reserved: int
    """Of them, put aside for the confirmation."""
    used: int
    cut_short: tuple[Literal["search", "confirmation"], ...]
    """What the clock ended before it was through."""


class Tuning(Result):
    """A search over settings of the mask, and what of it held on other items."""

    schema_id: ClassVar[str] = "melens/tune/1"

    kind: Literal["tune"] = "tune"
    schema_: Literal["melens/tune/1"] = Field(default="melens/tune/1", alias="schema")
    metric: str
    unit: str
    higher_is_better: bool
    me_layer: int | None
    """From 0, at the block output."""
    in_space: int
    """Settings of the space, controls included; ``trials`` has those that the budget carried."""
    trials: tuple[Trial, ...]
    base: float | None
    """The unedited model on the held-out items; None where the clock left no time for any."""
    confirmed: tuple[Confirmed, ...]
    """Candidates by their rank in the race, then controls."""
    best: Edit | None
    """The first confirmed candidate whose corrected interval lies on the better side of zero, by
    more than rounding (RESOLUTION of the unedited value)."""
    margin: Margin | None
    """Where there is a best."""
    split: Split
    budget: Spent
    rule: str
    items: str | None
    """Name of the file beside this one with every score."""
    run: RunInfo

    @model_validator(mode="after")
    def _fits_together(self) -> Tuning:
        """Refuse what no search can have made."""
        if set(self.split.development) & set(self.split.held_out):
            raise ValueError("development and held-out items must be disjoint")
        if not self.trials or len(self.trials) > self.in_space:
            raise ValueError("trials must be some of the space's settings")
        if any(not 1 <= row.items <= len(self.split.development) for row in self.trials):
            raise ValueError("a trial has more items than there are, or none")
        if any(not 1 <= row.items <= len(self.split.held_out) for row in self.confirmed):
            raise ValueError("a confirmation has more items than there are, or none")
        if bool(self.confirmed) != (self.base is not None):
            raise ValueError("base and confirmed must go together")
        for row in self.confirmed:
            assert self.base is not None
            apart = row.value - self.base - row.delta
            if abs(apart) > 1e-6 * max(1.0, abs(row.value), abs(self.base)):
                raise ValueError(f"the delta of {row.edit.label} must be its value - the base's")
        found = [row.edit for row in self.confirmed if row.found(self.sign)]
        if self.best != (found[0] if found else None):
            raise ValueError("best must be the first confirmed candidate that was found better")
        return self

    @property
    def sign(self) -> int:
        """1 where higher is better, else -1."""
        return 1 if self.higher_is_better else -1

    @property
    def winner(self) -> Confirmed | None:
        """What was confirmed of the best setting."""
        return next((row for row in self.confirmed if row.edit == self.best), None)

    def rows(self) -> list[JsonObject]:
        """One row a setting: trials, then what was confirmed."""
        parts = (("development", self.trials), ("held out", self.confirmed))
        return [
            {"on": name, "setting": row.edit.label, **row.model_dump(exclude={"edit"})}
            for name, rows in parts
            for row in rows
        ]

    def shown(self) -> list[JsonObject]:
        """The main columns: what was confirmed, then the trials, best first."""
        keep = (
            "on",
            "setting",
            "role",
            "items",
            "delta",
            "interval",
            "corrected",
            "optimism",
            "energy",
            "stopped_after",
        )
        rows = sorted(
            self.rows(), key=lambda row: (row["on"] != "held out", -self.sign * row["delta"])
        )
        return [{key: row.get(key) for key in keep} for row in rows]

    def summary(self) -> str:
        """Plain sentences; layers count from 0."""
        better = "higher" if self.higher_is_better else "lower"
        most = max(trial.items for trial in self.trials)
        text = (
            f"{self.run.subject}, {self.metric} ({self.unit}, {better} is better): "
            f"{len(self.trials)} of {self.in_space} settings tried on up to {most} development "
            f"items, {self.budget.used} evaluations. {self.verdict()}"
        )
        controls = [
            f"{row.edit.label} {with_interval(row.delta, row.interval, '+.3g')}"
            for row in self.confirmed
            if row.role == "control"
        ]
        if controls:
            text += (
                f" Controls, 95 % uncorrected, made of the best in development "
                f"({self.confirmed[0].edit.label}): {'; '.join(controls)}."
            )
        if cut := self.budget.cut_short:
            text += f" The clock ended the {' and the '.join(cut)} early."
        return text + " Layers count from 0."

    def verdict(self) -> str:
        """Whether any setting improves the metric on held-out items, in plain words."""
        if not self.confirmed:
            return "Nothing was confirmed: no time was left for held-out items."
        verb = "raises" if self.higher_is_better else "lowers"
        on = "held-out text" if self.metric == "loss" else "held-out items"
        first, tested = self.confirmed[0], sum(r.role == "candidate" for r in self.confirmed)
        row, winner = first, self.winner
        if winner is not None:
            row = winner
            text = f"Found: {row.edit.label} {verb} the {self.metric} on {on}, by a difference of"
        else:
            text = (
                f"No setting that was tried {verb} the {self.metric} on {on} beyond chance; the "
                f"best in development, {row.edit.label}, changes it by"
            )
        text += f" {with_interval(row.delta, row.interval, '+.3g')} over {row.items} items"
        if row.corrected is not None:
            corrected = interval_text(row.corrected, "+.3g")
            text += f", {corrected} corrected for {tested} confirmed (Bonferroni)"
        assert row.development is not None
        assert row.optimism is not None
        text += f". In development {row.development:+.3g}: optimism {row.optimism:+.3g}."
        return text + (self._beside_controls() if winner is not None else "")

    def _beside_controls(self) -> str:
        """What the best is worth beyond what a control gives."""
        text = ""
        if self.best is not None and self.best.select.startswith("bottom"):
            text = " It masks the smallest dimensions, which the method holds to be a control."
        if self.margin is None:
            return text
        known = self.margin.interval
        ahead = _beyond(known, self.sign, RESOLUTION * abs(self.base or 0.0))
        said = "It does more than" if ahead else "The items cannot tell it from, or it is behind,"
        return text + (
            f" {said} the best control ({self.margin.control.label}): "
            f"{with_interval(self.margin.delta, known, '+.3g')} between them."
        )


def _beyond(interval: Interval | None, sign: int, least: float) -> bool:
    """Whether an interval lies on the better side of zero, at least that far away."""
    if interval is None:
        return False
    nearest = interval[0] if sign > 0 else -interval[1]
    return nearest > least
