"""From the rows of a search to its result: rankings, controls, intervals, the best setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from melens.evaluating.edits import EditCondition, conditions
from melens.evaluating.forced import Forced
from melens.framing import bos_first
from melens.inputs import Inputs
from melens.intervals import Estimate, paired_difference, weighted_mean
from melens.item_rows import Rows
from melens.protocols import HookedModel, JsonObject
from melens.results import MELayer
from melens.results.tune import Confirmed, Margin, Spent, Split, Trial, Tuning
from melens.settings import Compare, Run
from melens.tuning.items import Halves, Objective
from melens.tuning.space import ETA, Budget, Race

Half = Literal["search", "confirmation"]
STOPPED: tuple[Half, ...] = ("search", "confirmation")
MARKS = ("base", "plan", *(f"stop {part}" for part in STOPPED))
"""Conditions of rows that are no evaluation."""


@dataclass(frozen=True)
class Ledger:
    """Reads scores off the rows, always paired with the unedited run's."""

    rows: Rows
    objective: Objective
    seed: int

    @property
    def sign(self) -> int:
        """What a difference is multiplied by so that more is better."""
        return 1 if self.objective.higher_is_better else -1

    def column(self, name: str, items: Sequence[Forced]) -> tuple[Tensor, Tensor]:
        """Values under a condition, and the unedited run's weights."""
        found = self.rows.found
        values = [found[item.id, name].value for item in items]
        weights = [found[item.id, "base"].weight for item in items]
        return torch.tensor(values).double(), torch.tensor(weights).double()

    def differences(self, name: str, items: Sequence[Forced]) -> tuple[Tensor, Tensor]:
        """Condition minus base, item by item, and weights."""
        values, weights = self.column(name, items)
        return values - self.column("base", items)[0], weights

    def gain(self, name: str, items: Sequence[Forced]) -> float:
        """Weighted mean difference, more is better."""
        x, w = self.differences(name, items)
        return self.sign * float((x * w).sum() / w.sum())

    def mean(self, name: str, items: Sequence[Forced]) -> float:
        """Weighted mean value."""
        values, weights = self.column(name, items)
        return float((values * weights).sum() / weights.sum())

    def paired(self, name: str, items: Sequence[Forced], other: str = "base") -> Estimate:
        """Mean difference to another condition with its 95 % interval."""
        values, weights = self.column(name, items)
        return paired_difference(values, self.column(other, items)[0], weights, seed=self.seed)

    def energy(self, name: str, items: Sequence[Forced]) -> float | None:
        """Masked share of the token's energy, mean over items."""
        rows = [self.rows.found[item.id, name] for item in items]
        seen = [row.also["energy"][0] for row in rows if "energy" in row.also]
        return sum(seen) / len(seen) if seen else None


@dataclass
class Found:
    """How far a race has come."""

    entered: list[EditCondition]
    seen: tuple[Forced, ...] = ()
    """Development items that the settings still running have seen."""
    shown: dict[str, tuple[Forced, ...]] = field(default_factory=dict)
    """Setting -> the items it was run on."""
    stopped: dict[str, int] = field(default_factory=dict)
    """Setting -> the rung, from 1, after which it was stopped."""
    alive: list[EditCondition] = field(default_factory=list)
    confirmed: Sequence[EditCondition] = ()
    others: Sequence[EditCondition] = ()
    held: tuple[Forced, ...] = ()
    race: Race | None = None
    planned: int = 0
    reserved: int = 0

    def show(self, settings: Sequence[EditCondition], items: Sequence[Forced]) -> None:
        """Note that settings were run on more items."""
        self.seen = (*self.seen, *items)
        self.alive = list(settings)
        for condition in settings:
            self.shown[condition.name] = self.seen

    def stop(self, settings: Sequence[EditCondition], *, after: int) -> None:
        """Note that settings lost."""
        self.stopped.update({condition.name: after for condition in settings})

    def ranked(self, ledger: Ledger, role: str) -> list[EditCondition]:
        """Settings of a role still running, best first; equals in the space's order."""
        running = [condition for condition in self.alive if condition.role == role]
        return sorted(running, key=lambda c: -ledger.gain(c.name, self.seen))

    def best(self, ledger: Ledger, count: tuple[int, int]) -> list[EditCondition]:
        """The best candidates and controls, in the order they entered."""
        kept = [
            *self.ranked(ledger, "edited")[: count[0]],
            *self.ranked(ledger, "control")[: count[1]],
        ]
        return [condition for condition in self.entered if condition in kept]


def made_controls(
    model: HookedModel,
    best: EditCondition,
    raced: Sequence[EditCondition],
    me_layer: MELayer,
    seed: int,
) -> list[EditCondition]:
    """Controls to confirm: the best random dims of the race, and the best candidate's own two."""
    own = conditions(model, best.edit, me_layer, Compare(rates=(), strengths=(), seeds=(seed,)))
    made = [
        *raced,
        *(EditCondition(c.edit.label, "control", c.edit) for c in own if c.role == "control"),
    ]
    return list({condition.edit: condition for condition in made}.values())


class _Searched(Protocol):
    """What a result is put together from, of a search that is over."""

    inputs: Inputs
    me_layer: MELayer
    objective: Objective
    halves: Halves
    budget: Budget
    how: Run

    @property
    def model(self) -> HookedModel: ...
    @property
    def rows(self) -> Rows: ...
    @property
    def candidates(self) -> Sequence[EditCondition]: ...
    @property
    def controls(self) -> Sequence[EditCondition]: ...


def assembled(search: _Searched, ledger: Ledger, found: Found) -> Tuning:
    """The result, from the rows alone."""
    chosen = [*found.confirmed, *found.others] if found.held else []
    confirmed = tuple(_confirmed(condition, ledger, found) for condition in chosen)
    better = [row for row in confirmed if row.found(ledger.sign)]
    run, objective = search.how, search.objective
    located = search.me_layer.run.settings
    return Tuning(
        metric=objective.name or "a function",
        unit=objective.unit,
        higher_is_better=objective.higher_is_better,
        me_layer=search.me_layer.me_layer,
        in_space=len(search.candidates) + len(search.controls),
        trials=tuple(_trial(condition, ledger, found) for condition in found.entered),
        base=ledger.mean("base", found.held) if found.held else None,
        confirmed=confirmed,
        best=better[0].edit if better else None,
        margin=_margin(better[0], confirmed, ledger, found) if better else None,
        split=_split(search),
        budget=_spent(search, found),
        rule=_rule(found),
        items=run.keep and run.keep.name,
        run=search.inputs.run_info(
            seed=run.seed,
            items=search.rows.key,
            me_layer_of=located.get("ids"),
            **_about(search.model, (*search.halves.development, *search.halves.held_out)),
        ),
    )


def _about(model: HookedModel, items: Sequence[Forced]) -> JsonObject:
    tokenizer, rows = getattr(model, "tokenizer", None), [item.ids for item in items]
    start = {} if tokenizer is None else {"bos_first": bos_first(tokenizer, rows)}
    counts = {"sequences": len(rows), "tokens": sum(map(len, rows)), "length": max(map(len, rows))}
    return {**counts, **start}


def _trial(condition: EditCondition, ledger: Ledger, found: Found) -> Trial:
    name, items = condition.name, found.shown[condition.name]
    delta = ledger.paired(name, items)
    return Trial(
        edit=condition.edit,
        role=_role(condition),
        items=len(items),
        value=ledger.mean(name, items),
        delta=delta.value,
        interval=delta.interval,
        energy=ledger.energy(name, items),
        stopped_after=found.stopped.get(name),
    )


def _confirmed(condition: EditCondition, ledger: Ledger, found: Found) -> Confirmed:
    name, held = condition.name, found.held
    delta = ledger.paired(name, held)
    development = None
    if name in found.shown:
        development = ledger.paired(name, found.shown[name]).value
    corrected = None
    if condition.role == "edited":
        apart = ledger.differences(name, held)
        corrected = weighted_mean(*apart, seed=ledger.seed, tests=len(found.confirmed)).interval
    return Confirmed(
        edit=condition.edit,
        role=_role(condition),
        items=len(held),
        value=ledger.mean(name, held),
        delta=delta.value,
        interval=delta.interval,
        corrected=corrected,
        energy=ledger.energy(name, held),
        development=development,
        optimism=None if development is None else development - delta.value,
    )


def _margin(
    best: Confirmed, confirmed: Sequence[Confirmed], ledger: Ledger, found: Found
) -> Margin | None:
    """The best setting against the control that does best on the same held-out items."""
    controls = [row for row in confirmed if row.role == "control"]
    if not controls:
        return None
    rival = max(controls, key=lambda row: ledger.sign * row.delta)
    delta = ledger.paired(best.edit.label, found.held, rival.edit.label)
    return Margin(control=rival.edit, delta=delta.value, interval=delta.interval)


def _split(search: _Searched) -> Split:
    halves = search.halves
    return Split(
        development=tuple(item.id for item in halves.development),
        held_out=tuple(item.id for item in halves.held_out),
        seed=search.how.seed,
        share=search.budget.held_out,
        repeated=halves.repeated,
    )


def _spent(search: _Searched, found: Found) -> Spent:
    names = [name for _, name in search.rows.found if name not in MARKS]
    stops: list[Half] = [part for part in STOPPED if search.rows.has("stop", f"stop {part}")]
    return Spent(
        evaluations=search.budget.evaluations,
        seconds=search.budget.seconds,
        planned=found.planned,
        reserved=found.reserved,
        used=len(names),
        cut_short=tuple(stops),
    )


def _rule(found: Found) -> str:
    assert found.race is not None
    rungs = ", ".join(map(str, found.race.rungs))
    return (
        f"successive halving: after {rungs} development items the best 1 in {ETA} go on, "
        f"candidates (never fewer than the {found.race.keep} to be confirmed) and controls apart, "
        "by the weighted mean of their paired differences to the unedited model; corrected "
        f"intervals: Bonferroni for {len(found.confirmed)} confirmed"
    )


def _role(condition: EditCondition) -> Literal["candidate", "control"]:
    return "control" if condition.role == "control" else "candidate"
