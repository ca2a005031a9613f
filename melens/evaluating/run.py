"""evaluate(): a task with an edit and without it, paired by item, beside doses and controls."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from melens import locating
from melens.errors import MetricError, PromptError
from melens.evaluating.edits import check_edit, check_held, check_unedited, conditions
from melens.evaluating.forced import ForcedOutcome, Foreseen, Runner
from melens.evaluating.generated import generated
from melens.evaluating.harness.data import GENERATION_TASKS
from melens.evaluating.scores import (
    ENERGY,
    Progress,
    Settings,
    Setup,
    TaskCard,
    assembled,
    held_facts,
    score_of,
)
from melens.evaluating.sources import check_source
from melens.evaluating.tasks import FORCED_TASKS, ForcedTask, Source, alike
from melens.framing import bos_first, require_known
from melens.inputs import Inputs
from melens.item_rows import ItemRow, Rows
from melens.measuring.located import check_same_model
from melens.models.loading import adopt
from melens.models.origin import fingerprint
from melens.results import MELayer
from melens.results.edit import Edit
from melens.results.evaluation import Evaluation

__all__ = ["Settings", "evaluate", "score_of"]

TOKEN_STEP = 0.01
"""Nats by which a token's loss must move to count as better or worse."""


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
             task: one of ``melens.evaluating.tasks.FORCED_TASKS`` or ``GENERATION_TASKS``.
             edit: None = WeMask by gamma, rate 0.5, all layers after the ME Layer.
             me_layer: what ``melens.locate`` returns; None = located here on the bundled texts,
             with the BOS or the chat template of the items.
             source: where the items come from.
             settings: doses, controls, rivals, seed, file of items.
             progress: called with (steps done, steps in all).
    Returns: values and paired differences with 95 % bootstrap intervals over items.
    Raises:  UnknownNameError: no such task. PromptError: items that cannot be had.
             InterventionError, SiteError: an edit that changes nothing or that this model cannot
             follow. ResultError: the file of items is of another evaluation, or ``me_layer`` of
             another model. MissingPackageError: a task that generates, without melens[eval].
    """
    settings, source = settings or Settings(), source or Source()
    edit = edit or Edit()
    check_edit(edit)
    check_source(task, source)
    bridge = adopt(model)
    check_unedited(bridge)
    if bridge.tokenizer is None:
        raise PromptError("this model has no tokenizer; load it with melens.load(..., tokenizer=).")
    inputs = Inputs(bridge, [], {}, fingerprint(bridge))
    if me_layer is not None:
        check_same_model(inputs, me_layer)
    made = None if task in GENERATION_TASKS else FORCED_TASKS[task](bridge.tokenizer, source)
    if made is not None:
        _check_context(bridge, made)
    me_layer = me_layer or locating.locate(bridge, alike(bridge.tokenizer, task, source))
    chosen = conditions(bridge, edit, me_layer, settings.plan)
    bench = Setup(inputs, chosen, me_layer, settings)
    if made is None:
        return generated(bench, GENERATION_TASKS[task], source, progress)
    return _forced(bench, made, source, progress)


def _check_context(model: Any, task: ForcedTask) -> None:
    require_known([item.ids for item in task.items], model.cfg.d_vocab)
    limit = getattr(model.cfg, "n_ctx", None)
    longest = max(task.items, key=lambda item: len(item.ids))
    if limit and len(longest.ids) > limit:
        raise PromptError(
            f"item {longest.id} of {task.name} has {len(longest.ids)} tokens; the model's context "
            f"is {limit}."
        )


def _forced(
    bench: Setup, task: ForcedTask, source: Source, progress: Progress | None
) -> Evaluation:
    """Every item that an earlier run did not finish, then the result from the rows alone."""
    items, settings = task.items, bench.settings
    check_held(bench.model, bench.me_layer, [item.ids for item in items])
    rows = Rows(
        settings.items,
        bench.facts(task=task.name, items=[[item.id, list(item.ids)] for item in items]),
    )
    runner = Runner(
        bench.model, bench.conditions, bench.me_layer, batch_tokens=settings.batch_tokens
    )
    names = [condition.name for condition in bench.conditions]
    done = 0
    # Batches are those of the whole list: what is run again after a kill has the same company.
    for batch in runner.batches(items):
        if not all(rows.has(item.id, name) for item in batch for name in names):
            rows.add(_rows_of(task, runner.outcome(batch, bench.conditions)))
        done += len(batch)
        if progress is not None:
            progress(done, len(items))
    data = source.data and source.data.name
    card = TaskCard(
        task.name,
        task.unit,
        task.higher_is_better,
        task.about,
        {
            "data": data,
            "bos": source.bos,
            "chat": source.chat,
            **task.facts,
            "bos_first": bos_first(bench.model.tokenizer, [item.ids for item in items]),
        },
    )
    return assembled(bench, card, rows, [item.id for item in items])


def _rows_of(task: ForcedTask, outcome: ForcedOutcome) -> list[ItemRow]:
    made = []
    for name, found in outcome.found.items():
        for item, foreseen, plain, massive in zip(
            outcome.items, found, outcome.found["base"], outcome.massive, strict=True
        ):
            (value, weight), also = task.score(item, foreseen)
            if not math.isfinite(value):
                raise MetricError(
                    f"item {item.id} under {name} has a {task.unit} of {value}; load the model in "
                    "float32 or bfloat16."
                )
            if name in outcome.energy:
                also = {**also, ENERGY: (outcome.energy[name], 1.0)}
            also = {**also, **token_changes(foreseen, plain)}
            about = {**item.about, "token_loss": _rounded(foreseen.loss)}
            about |= held_facts(massive) if name == "base" else {}
            made.append(ItemRow(item.id, name, value, weight, also, about))
    return made


def token_changes(edited: Foreseen, plain: Foreseen) -> dict[str, tuple[float, float]]:
    """What a mean hides: how far single tokens' losses move, and which way.

    Returns: name -> (mean over the item's scored tokens, their number): ``token_change``, |loss
             edited - loss unedited| in nats; ``tokens_better`` and ``tokens_worse``, shares of
             tokens that move by more than TOKEN_STEP.
    """
    apart = edited.loss.double() - plain.loss.double()
    found = {
        "token_change": apart.abs(),
        "tokens_better": (apart < -TOKEN_STEP).double(),
        "tokens_worse": (apart > TOKEN_STEP).double(),
    }
    return {name: (x.mean().item(), float(len(apart))) for name, x in found.items()}


def _rounded(losses: Tensor) -> list[float]:
    return [round(loss, 5) for loss in losses.tolist()]
