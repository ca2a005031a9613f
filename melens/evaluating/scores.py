"""How an evaluation is run, and from rows of items to means, differences and what stands beside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from melens.errors import ResultError
from melens.evaluating.edits import EditCondition, located_facts
from melens.evaluating.forced import MassiveIn
from melens.inputs import Inputs
from melens.intervals import paired_difference, weighted_mean
from melens.item_rows import ItemRow, Rows
from melens.protocols import HookedModel, JsonObject
from melens.results import MELayer
from melens.results.evaluation import ConditionScore, Delta, EditedIn, Evaluation
from melens.settings import Run


@dataclass(frozen=True)
class TaskCard:
    """What a task is, to be said in the result."""

    name: str
    unit: str
    higher_is_better: bool
    about: str
    facts: JsonObject = field(default_factory=dict)
    """Goes into the run's settings."""


@dataclass(frozen=True)
class Setup:
    """A model and all that it is tried under."""

    inputs: Inputs
    """The model and the fingerprint of its weights; no batches."""
    conditions: tuple[EditCondition, ...]
    me_layer: MELayer
    run: Run

    @property
    def model(self) -> HookedModel:
        """The bridge."""
        return self.inputs.model

    def facts(self, **more: object) -> JsonObject:
        """What every number depends on, with what the kind of task adds."""
        return {
            **self.inputs.facts(),
            "conditions": [[c.name, c.edit.model_dump(mode="json")] for c in self.conditions],
            "located": located_facts(self.me_layer),
            **more,
        }


ENERGY = "energy"
"""Name among an item's further measures that becomes a field of its own."""


HELD = "massive"
"""Name among a base row's facts: the item's massive tokens."""


def held_facts(found: MassiveIn | None) -> JsonObject:
    """What the base row of an item keeps of its massive tokens."""
    return {} if found is None else {HELD: asdict(found)}


def held_in(rows: Sequence[ItemRow]) -> EditedIn | None:
    """The massive tokens of all items, from their base rows; None where they were not counted."""
    found = [row.about[HELD] for row in rows if HELD in row.about]
    held = [one for one in found if one["tokens"]]
    if len(found) < len(rows) or not rows:
        return None
    return EditedIn(
        tokens=sum(one["tokens"] for one in held),
        items=len(held),
        coordinate=_range(one["coordinate"] for one in held),
        norm_ratio=_range(one["norm_ratio"] for one in held),
    )


def _range(values: Iterable[float | None]) -> tuple[float, float] | None:
    found = sorted(value for value in values if value is not None)
    return (found[0], found[-1]) if found else None


def assembled(bench: Setup, card: TaskCard, rows: Rows, order: Sequence[str]) -> Evaluation:
    """The result, from finished rows alone.

    Args:    order: ids of the items, in the order of the data.
    """
    tables = {c.name: [rows.of(c.name)[item] for item in order] for c in bench.conditions}
    base = tables["base"]
    seed, path = bench.run.seed, bench.run.keep
    scores = [score_of(c, tables[c.name], base, seed) for c in bench.conditions]
    edited = next(score for score in scores if score.role == "edited")
    assert edited.delta is not None
    margin = tables[edited.name]
    scores = [_with_margin(score, margin, tables[score.name], seed) for score in scores]
    counted = [at for at, row in enumerate(base) if row.weight > 0]
    apart = {
        name: tuple(table[at].value - base[at].value for at in counted)
        for name, table in tables.items()
        if name != "base"
    }
    massive = held_in([base[at] for at in counted])
    run = bench.inputs.run_info(
        seed=seed, items=rows.key, me_layer_of=bench.me_layer.run.settings.get("ids"), **card.facts
    )
    return Evaluation(
        task=card.name,
        unit=card.unit,
        n=len(counted),
        higher_is_better=card.higher_is_better,
        weight=sum(row.weight for row in base),
        edit=edited.edit,
        massive=massive,
        with_token=massive.items if massive is not None else None,
        me_layer=bench.me_layer.me_layer,
        base=scores[0],
        edited=edited,
        delta=edited.delta,
        dose=_with_role(scores, "dose"),
        controls=_with_role(scores, "control"),
        rivals=_with_role(scores, "rival"),
        items=path and path.name,
        about=card.about,
        run=run,
        differences=apart,
        weights=tuple(base[at].weight for at in counted),
    )


def _with_role(scores: Sequence[ConditionScore], role: str) -> tuple[ConditionScore, ...]:
    return tuple(score for score in scores if score.role == role)


def _with_margin(
    score: ConditionScore, edited: Sequence[ItemRow], rows: Sequence[ItemRow], seed: int
) -> ConditionScore:
    """A control, with how much further the edit goes."""
    if score.role != "control":
        return score
    pairs = [(a, b) for a, b in zip(edited, rows, strict=True) if a.weight > 0]
    found = paired_difference(
        _column(a.value for a, _ in pairs),
        _column(b.value for _, b in pairs),
        _column(a.weight for a, _ in pairs),
        seed=seed,
    )
    margin = Delta(value=found.value, interval=found.interval)
    return score.model_copy(update={"margin": margin})


def score_of(
    condition: EditCondition, rows: Sequence[ItemRow], base: Sequence[ItemRow], seed: int
) -> ConditionScore:
    """One condition's mean and its paired difference to the base; rows in the same order.

    An item of weight 0 does not count in the value; its further measures still do.

    Raises:  ResultError: rows of other items, or no item that counts.
    """
    if [(row.item, row.weight) for row in rows] != [(row.item, row.weight) for row in base]:
        raise ResultError(f"{condition.name} and base have different items; nothing can be paired.")
    pairs = [(row, plain) for row, plain in zip(rows, base, strict=True) if row.weight > 0]
    if not pairs:
        raise ResultError("no item counts in this task's score; take more items.")
    values, plains = _column(r.value for r, _ in pairs), _column(b.value for _, b in pairs)
    weights = _column(row.weight for row, _ in pairs)
    mean = weighted_mean(values, weights, seed=seed)
    delta = None
    if condition.role != "base":
        # The difference of what is printed, not a second rounding of it.
        found = paired_difference(values, plains, weights, seed=seed)
        delta = Delta(value=found.value, interval=found.interval)
    also, also_delta = _further(condition, rows, base, seed)
    return ConditionScore(
        name=condition.name,
        role=condition.role,
        edit=condition.edit,
        value=mean.value,
        interval=mean.interval,
        delta=delta,
        energy=also.pop(ENERGY, None),
        also=also,
        also_delta=also_delta,
    )


def _further(
    condition: EditCondition, rows: Sequence[ItemRow], base: Sequence[ItemRow], seed: int
) -> tuple[dict[str, float], dict[str, Delta]]:
    """Means of all further measures over the items that have them, and their differences."""
    also, apart = {}, {}
    for name in dict.fromkeys(name for row in rows for name in row.also):
        held = [(row, plain) for row, plain in zip(rows, base, strict=True) if name in row.also]
        values, weights = (_column(row.also[name][i] for row, _ in held) for i in (0, 1))
        also[name] = float((values * weights).sum() / weights.sum())
        if condition.role != "base" and all(name in plain.also for _, plain in held):
            before = _column(plain.also[name][0] for _, plain in held)
            found = paired_difference(values, before, weights, seed=seed)
            apart[name] = Delta(value=found.value, interval=found.interval)
    return also, apart


def _column(values: object) -> Tensor:
    return torch.tensor(list(values)).double()  # type: ignore[call-overload]
