"""evaluate(): a task with an edit and without it, paired by item, beside doses and controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from melens import __version__, emergence
from melens.errors import PromptError, ResultError
from melens.evaluation.conditions import Condition, Plan, conditions
from melens.evaluation.forced import Outcome, Runner
from melens.evaluation.rows import ItemRow, Rows
from melens.evaluation.tasks import FORCED_TASKS, ForcedTask, Source
from melens.inputs import Inputs
from melens.metrics.paired import paired_difference, weighted_mean
from melens.models.loading import adopt
from melens.models.origin import fingerprint
from melens.results import MELayer
from melens.results.edit import Edit
from melens.results.evaluation import ConditionScore, Delta, Evaluation

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """How an evaluation is run."""

    plan: Plan = field(default_factory=Plan)
    seed: int = 0
    """Of the bootstrap."""
    batch_tokens: int = 1024
    """Tokens a forward pass, padding included."""
    items: Path | None = None
    """JSON-lines file of every item's scores; an interrupted run goes on from it."""


def evaluate(  # noqa: PLR0913 (task, edit and how to run it are three things)
    model: Any,
    task: str,
    edit: Edit | None = None,
    *,
    me_layer: MELayer | None = None,
    source: Source | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Hold an edit against the unedited model on one task, item by item.

    Doses of the edit and both controls (other layers, random dimensions) are always beside it.

    Args:    model: a name, a path, a transformers model or a bridge.
             task: one of ``melens.evaluation.tasks.FORCED_TASKS`` or ``GENERATION_TASKS``.
             edit: None = WeMask by gamma, rate 0.5, all layers after the ME Layer.
             me_layer: what ``melens.locate`` returns; None = located here on the bundled texts.
             source: where the items come from.
             settings: doses, controls, rivals, seed, file of items.
             progress: called with (steps done, steps in all).
    Returns: values and paired differences with 95 % bootstrap intervals over items.
    Raises:  UnknownNameError: no such task. PromptError: items that cannot be had.
             InterventionError, SiteError: an edit that this model cannot follow.
             ResultError: the file of items is of another evaluation.
    """
    settings, source = settings or Settings(), source or Source()
    edit = edit or Edit()
    maker = FORCED_TASKS[task]
    bridge = adopt(model)
    if bridge.tokenizer is None:
        raise PromptError("this model has no tokenizer; load it with melens.load(..., tokenizer=).")
    made = maker(bridge.tokenizer, source)
    _check_context(bridge, made)
    me_layer = me_layer or emergence.locate(bridge)
    chosen = conditions(bridge, edit, me_layer, settings.plan)
    job = _Job(bridge, made, chosen, me_layer, settings)
    rows = Rows(settings.items, job.facts())
    job.run(rows, progress)
    return job.assembled(rows)


def _check_context(model: Any, task: ForcedTask) -> None:
    limit = getattr(model.cfg, "n_ctx", None)
    longest = max(task.items, key=lambda item: len(item.ids))
    if limit and len(longest.ids) > limit:
        raise PromptError(
            f"item {longest.id} of {task.name} has {len(longest.ids)} tokens; the model's context "
            f"is {limit}."
        )


@dataclass(frozen=True)
class _Job:
    """One task under its conditions."""

    model: Any
    task: ForcedTask
    conditions: tuple[Condition, ...]
    me_layer: MELayer
    settings: Settings

    def facts(self) -> dict[str, Any]:
        """What the numbers depend on."""
        return {
            "melens": __version__, "task": self.task.name, "weights": fingerprint(self.model),
            "dtype": str(next(self.model.parameters()).dtype),
            "items": [[item.id, list(item.ids)] for item in self.task.items],
            "conditions": [[c.name, c.edit.model_dump(mode="json")] for c in self.conditions],
        }  # fmt: skip

    def run(self, rows: Rows, progress: Progress | None) -> None:
        """Every item that an earlier run did not finish."""
        runner = Runner(
            self.model, self.conditions, self.me_layer, batch_tokens=self.settings.batch_tokens
        )
        items = self.task.items
        left = [i for i in items if not all(rows.has(i.id, c.name) for c in self.conditions)]
        done = len(items) - len(left)
        for outcome in runner.run(left):
            rows.add(_rows_of(self.task, outcome))
            done += len(outcome.items)
            if progress is not None:
                progress(done, len(items))

    def assembled(self, rows: Rows) -> Evaluation:
        """The result, from the rows alone."""
        order = [item.id for item in self.task.items]
        tables = {c.name: [rows.of(c.name)[i] for i in order] for c in self.conditions}
        seed = self.settings.seed
        scores = [score_of(c, tables[c.name], tables["base"], seed) for c in self.conditions]
        edited = next(s for s in scores if s.role == "edited")
        assert edited.delta is not None
        path = self.settings.items
        run = Inputs(self.model, [], {}, fingerprint(self.model)).run_info(
            seed=seed, items=rows.key, me_layer_of=self.me_layer.run.settings.get("ids"),
            **self.task.facts,
        )  # fmt: skip
        return Evaluation(
            task=self.task.name, unit=self.task.unit, n=len(order),
            higher_is_better=self.task.higher_is_better,
            weight=sum(row.weight for row in tables["base"]), edit=edited.edit,
            me_layer=self.me_layer.me_layer, base=scores[0], edited=edited, delta=edited.delta,
            dose=_with_role(scores, "dose"), controls=_with_role(scores, "control"),
            rivals=_with_role(scores, "rival"), items=path and path.name, about=self.task.about,
            run=run,
        )  # fmt: skip


def _rows_of(task: ForcedTask, outcome: Outcome) -> list[ItemRow]:
    made = []
    for name, found in outcome.found.items():
        for item, foreseen in zip(outcome.items, found, strict=True):
            (value, weight), also = task.score(item, foreseen)
            if name in outcome.energy:
                also = {**also, "energy": (outcome.energy[name], 1.0)}
            made.append(ItemRow(item.id, name, value, weight, also, dict(item.about)))
    return made


def _with_role(scores: Sequence[ConditionScore], role: str) -> tuple[ConditionScore, ...]:
    return tuple(score for score in scores if score.role == role)


def score_of(
    condition: Condition, rows: Sequence[ItemRow], base: Sequence[ItemRow], seed: int
) -> ConditionScore:
    """One condition's mean and its paired difference to the base; rows in the same order."""
    if [row.item for row in rows] != [row.item for row in base]:
        raise ResultError(f"{condition.name} and base have different items; nothing can be paired.")
    values, weights = _column(rows), torch.tensor([row.weight for row in rows])
    mean = weighted_mean(values, weights, seed=seed)
    delta = None
    if condition.role != "base":
        # The difference of what is printed, not a second rounding of it.
        found = paired_difference(values, _column(base), weights, seed=seed)
        delta = Delta(value=found.value, interval=found.interval)
    also = {
        name: weighted_mean(
            torch.tensor([row.also[name][0] for row in rows]).double(),
            torch.tensor([row.also[name][1] for row in rows]).double(),
        ).value
        for name in (rows[0].also if rows else {})
        if all(name in row.also for row in rows)
    }
    return ConditionScore(
        name=condition.name, role=condition.role, edit=condition.edit, value=mean.value,
        interval=mean.interval, delta=delta, energy=also.pop("energy", None), also=also,
    )  # fmt: skip


def _column(rows: Sequence[ItemRow]) -> torch.Tensor:
    return torch.tensor([row.value for row in rows]).double()
