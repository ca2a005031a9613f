"""Evaluation: one task with an edit and without it, paired, its doses and its controls."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from melens.formatting import Interval, interval_text, with_interval
from melens.protocols import JsonObject
from melens.provenance import RunInfo
from melens.results.base import Part, Result, added_later
from melens.results.edit import Edit

NATS = "nats a token"
LARGEST = 700.0
"""Nats; the exponential of more is no number."""
Role = Literal["base", "edited", "dose", "control", "rival"]


class Score(Part):
    """A mean over items, weighted as the task says."""

    value: float
    interval: Interval | None
    """95 % bootstrap over items; None where too few or equal items say nothing."""


class Delta(Score):
    """Edited minus base, item by item."""

    paired: Literal[True] = True


class EditedIn(Part):
    """The massive tokens that the edits change, as the unedited run shows them."""

    tokens: int
    items: int
    """Items that hold at least one."""
    coordinate: Interval | None
    """Least and largest over items: |x| in the massive dimension at the ME Layer's output."""
    norm_ratio: Interval | None
    """Of the same tokens: norm over the located texts' median token norm."""

    def said(self) -> str:
        """In words."""
        text = f"Edited: {self.tokens} massive tokens in {self.items} items"
        sizes: list[str] = []
        if self.coordinate is not None:
            sizes.append(f"coordinate {interval_text(self.coordinate, ',.0f')}")
        if self.norm_ratio is not None:
            sizes.append(f"norm {interval_text(self.norm_ratio, '.3g')} x the median")
        return f"{text} ({', '.join(sizes)})" if sizes else text


RESOLUTION = 1e-5
"""Of the base value: smaller differences are rounding. A mask that edits almost nothing still
changes how float32 rounds, and more items do not remove that."""


class ConditionScore(Score):
    """The task's value under one edit."""

    name: str
    role: Role
    edit: Edit
    delta: Delta | None
    """None for the base."""
    energy: float | None = None
    """Masked share of the token's squared norm at the attention input, 0 to 1; masks only."""
    also: dict[str, float] = Field(default_factory=dict)
    """The task's further means: bits_per_byte, kl, agreement, other metrics."""
    also_delta: dict[str, Delta] = Field(default_factory=dict)
    """Their differences to the base, paired as the value's; none for the base."""
    margin: Delta | None = None
    """Of a control: the edit's value minus the control's, paired."""

    @property
    def moved(self) -> bool:
        """Whether the interval of the difference leaves zero out, by more than rounding."""
        return _apart(self.delta, RESOLUTION * abs(self.value)) != 0


class Evaluation(Result):
    """What one task gives with an edit, against the same items without it."""

    schema_id: ClassVar[str] = "melens/evaluate/1"

    kind: Literal["evaluate"] = "evaluate"
    schema_: Literal["melens/evaluate/1"] = Field(default="melens/evaluate/1", alias="schema")
    task: str
    unit: str
    higher_is_better: bool
    n: int
    """Items."""
    with_token: int | None = None
    """Of all items, those that hold a token which the edits change; None where not counted."""
    massive: EditedIn | None = added_later()
    """Which tokens are edited, and how massive they are; None where not counted."""
    weight: float
    """Sum of the items' weights: tokens, or items."""
    edit: Edit
    me_layer: int | None
    """From 0, at the block output."""
    base: ConditionScore
    edited: ConditionScore
    delta: Delta
    dose: tuple[ConditionScore, ...]
    controls: tuple[ConditionScore, ...]
    rivals: tuple[ConditionScore, ...]
    items: str | None
    """Name of the file beside this one with every item's prompt, answer and scores."""
    about: str
    """Plain words: what is measured, on what, and how prompts were made."""
    differences: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    """Condition's name -> edited minus base of every item, in the order of the data."""
    weights: tuple[float, ...] = ()
    """Of the same items."""
    run: RunInfo

    @model_validator(mode="after")
    def _fits_together(self) -> Evaluation:
        """Refuse what no run can have made."""
        if self.base.delta is not None or self.base.role != "base":
            raise ValueError("base must have no delta")
        others = self.conditions[1:]
        if any(c.delta is None for c in others) or self.edited.delta != self.delta:
            raise ValueError("every edited condition needs its delta")
        for c in others:
            assert c.delta is not None
            apart = c.value - self.base.value - c.delta.value
            if abs(apart) > 1e-6 * max(1.0, abs(c.value), abs(self.base.value)):
                raise ValueError(f"the delta of {c.name} must be its value - the base's")
            self._check_items(c)
        return self

    def _check_items(self, condition: ConditionScore) -> None:
        """The mean of an item's differences is what is printed."""
        apart = self.differences.get(condition.name)
        if apart is None or condition.delta is None:
            return
        if not len(apart) == len(self.weights) == self.n:
            raise ValueError(f"{condition.name} must have a difference for each of {self.n} items")
        mean = sum(x * w for x, w in zip(apart, self.weights, strict=True)) / sum(self.weights)
        largest = max(1.0, abs(condition.value), *map(abs, apart))  # losses are float32
        if abs(mean - condition.delta.value) > 1e-6 * largest:
            raise ValueError(f"the differences of {condition.name} must average to its delta")

    @property
    def conditions(self) -> tuple[ConditionScore, ...]:
        """All of them, base first."""
        return (self.base, self.edited, *self.dose, *self.controls, *self.rivals)

    def perplexity(self, condition: ConditionScore) -> float | None:
        """exp(mean nats a token), over all tokens together; None for a task of another unit."""
        if self.unit != NATS or condition.value > LARGEST:
            return None
        return math.exp(condition.value)

    def rows(self) -> list[JsonObject]:
        """One row a condition."""
        nats = self.unit == NATS
        return [
            {
                "condition": c.name,
                "role": c.role,
                "edit": c.edit.label,
                "value": c.value,
                "interval": c.interval,
                "delta": c.delta.value if c.delta else None,
                "delta_interval": c.delta.interval if c.delta else None,
                "energy": c.energy,
                **({"perplexity": self.perplexity(c)} if nats else {}),
                **c.also,
            }
            for c in self.conditions
        ]

    def summary(self) -> str:
        """Plain sentences; says when the edit does not help, and what the controls do."""
        unit = f" {self.unit}"
        text = (
            f"{self.run.subject}, {self.task}, {self.n} items: "
            f"{self.base.value:.4g}{unit} without, {self.edited.value:.4g} with {self.edit.label}"
        )
        if self.edited.energy is not None:
            text += f" ({self.edited.energy:.0%} of the token's energy masked)"
        text += f"; difference {_delta(self.delta)}, {self._verdict()}."
        for c in self.controls:
            assert c.delta is not None
            energy = "" if c.energy is None else f" ({c.energy:.0%} of the energy)"
            text += f" Control, {c.name}{energy}: {_delta(c.delta)}."
        return f"{text}{self._beside()} Layers count from 0."

    def _beside(self) -> str:
        """Further measures of an answer, controls that do not exist, items that no edit touches."""
        text = ""
        if self.unit != NATS and self.edited.also_delta:
            shown = [f"{name} {_delta(delta)}" for name, delta in self.edited.also_delta.items()]
            text += f" Beside it: {', '.join(shown)}."
        if not any("layer" in c.name for c in self.controls):
            text += " No other layers were left for a control."
        if not any("random" in c.name for c in self.controls):
            text += " This edit has no control of random dimensions."
        if self.massive is not None:
            text += f" {self.massive.said()}."
        if self.with_token is not None and self.with_token < len(self.weights or ()):
            text += (
                f" Only {self.with_token} of {len(self.weights)} items hold a token that is edited;"
                " the others are in the mean as they are."
            )
        return text

    def _verdict(self) -> str:
        """Whether it helps, by the paired interval, and whether a control does as much."""
        if self.delta.interval is None:
            return "too few or equal items to say more"
        if not self.edited.moved:
            return "which the items cannot tell from none"
        better = (self.delta.value > 0) == self.higher_is_better
        said = "better" if better else "worse"
        as_much = [c.name for c in self.controls if self._does_as_much(c)]
        if as_much:
            said += f", but no more than a control ({', '.join(as_much)})"
        return f"{said} ({len(self.conditions) - 1} conditions tried, not corrected for)"

    def _does_as_much(self, control: ConditionScore) -> bool:
        """Whether the items cannot tell that the edit goes further than the control."""
        sign = 1 if self.delta.value > 0 else -1
        if control.margin is None or control.margin.interval is None:
            return control.delta is not None and (
                sign * control.delta.value >= abs(self.delta.value) * (1 - RESOLUTION)
            )
        return _apart(control.margin, RESOLUTION * abs(self.base.value)) != sign


def _apart(found: Delta | None, least: float) -> int:
    """1 or -1 where an interval lies above or below zero by more than ``least``, else 0."""
    if found is None or found.interval is None:
        return 0
    low, high = found.interval
    return 1 if low > least else -1 if high < -least else 0


def _delta(found: Delta) -> str:
    return with_interval(found.value, found.interval, "+.4g")
