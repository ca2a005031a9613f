"""evaluate(): a task with an edit and without it, paired by item, beside doses and controls."""

from __future__ import annotations

import math

from torch import Tensor

from melens import locating
from melens.errors import MetricError, PromptError
from melens.evaluating.edits import check_edit, conditions, unedited
from melens.evaluating.forced import Foreseen, ItemOutcome
from melens.evaluating.generated import generated
from melens.evaluating.harness.data import GENERATION_TASKS
from melens.evaluating.runner import rows_of_items
from melens.evaluating.scores import (
    ENERGY,
    Setup,
    TaskCard,
    assembled,
    held_facts,
    score_of,
)
from melens.evaluating.sources import check_source
from melens.evaluating.tasks import FORCED_TASKS, ForcedTask, alike
from melens.framing import bos_first, require_known
from melens.item_rows import ItemRow
from melens.protocols import HookedModel, ModelLike
from melens.results.edit import Edit
from melens.results.evaluation import Evaluation
from melens.results.reading import HoldsMELayer
from melens.settings import Compare, Items, Run, setting_of

__all__ = ["evaluate", "score_of"]

TOKEN_STEP = 0.01
"""Nats by which a token's loss must move to count as better or worse."""


def evaluate(  # noqa: PLR0913 (task, edit and how to run it are three things)
    model: ModelLike,
    task: str,
    edit: Edit | None = None,
    *,
    me_layer: HoldsMELayer | None = None,
    items: Items | None = None,
    compare: Compare | None = None,
    run: Run | None = None,
) -> Evaluation:
    """Hold an edit against the unedited model on one task, item by item.

    Doses of the edit and both controls (other layers, random dimensions) are always beside it.

    Args:    model: a name, a path, a transformers model or a bridge.
             task: one of ``melens.evaluating.tasks.FORCED_TASKS`` or ``GENERATION_TASKS``.
             edit: None = WeMask by gamma, rate 0.5, all layers after the ME Layer.
             me_layer: what ``melens.locate`` returns; None = located here on the bundled texts,
             with the BOS or the chat template of the items.
             items: where they come from. compare: doses, controls, rivals.
             run: seed, batches, file of items, progress.
    Returns: values and paired differences with 95 % bootstrap intervals over items.
    Raises:  UnknownNameError: no such task. PromptError: items that cannot be had.
             InterventionError, SiteError: an edit that changes nothing or that this model cannot
             follow. ResultError: the file of items is of another evaluation, or ``me_layer`` of
             another model. MissingPackageError: a task that generates, without melens[eval].
    """
    items, run = setting_of(items, Items, "items"), setting_of(run, Run, "run")
    edit = edit or Edit()
    check_edit(edit)
    check_source(task, items)
    inputs, found = unedited(model, me_layer)
    bridge = inputs.model
    if bridge.tokenizer is None:
        raise PromptError("this model has no tokenizer; load it with melens.load(..., tokenizer=).")
    made = None if task in GENERATION_TASKS else FORCED_TASKS[task](bridge.tokenizer, items)
    if made is not None:
        _check_context(bridge, made)
    found = found or locating.locate(inputs, alike(bridge.tokenizer, task, items))
    chosen = conditions(bridge, edit, found, compare)
    bench = Setup(inputs, chosen, found, run)
    if made is None:
        return generated(bench, GENERATION_TASKS[task], items)
    return _forced(bench, made, items)


def _check_context(model: HookedModel, task: ForcedTask) -> None:
    require_known([item.ids for item in task.items], model.cfg.d_vocab)
    limit = getattr(model.cfg, "n_ctx", None)
    longest = max(task.items, key=lambda item: len(item.ids))
    if limit and len(longest.ids) > limit:
        raise PromptError(
            f"item {longest.id} of {task.name} has {len(longest.ids)} tokens; the model's context "
            f"is {limit}."
        )


def _forced(bench: Setup, task: ForcedTask, chosen: Items) -> Evaluation:
    """Every item that an earlier run did not finish, then the result from the rows alone."""
    items = task.items
    facts = {"task": task.name, "items": [[item.id, list(item.ids)] for item in items]}
    rows = rows_of_items(bench, items, lambda one: _row(task, one), facts)
    data = chosen.data and chosen.data.name
    card = TaskCard(
        task.name,
        task.unit,
        task.higher_is_better,
        task.about,
        {
            "data": data,
            "bos": chosen.bos,
            "chat": chosen.chat,
            **task.facts,
            "bos_first": bos_first(bench.model.tokenizer, [item.ids for item in items]),
        },
    )
    return assembled(bench, card, rows, [item.id for item in items])


def _row(task: ForcedTask, one: ItemOutcome) -> ItemRow:
    (value, weight), also = task.score(one.item, one.found)
    if not math.isfinite(value):
        raise MetricError(
            f"item {one.item.id} under {one.condition} has a {task.unit} of {value}; load the "
            "model in float32 or bfloat16."
        )
    if one.energy is not None:
        also = {**also, ENERGY: (one.energy, 1.0)}
    also = {**also, **token_changes(one.found, one.plain)}
    about = {**one.item.about, "token_loss": _rounded(one.found.loss)}
    about |= held_facts(one.massive) if one.condition == "base" else {}
    return ItemRow(one.item.id, one.condition, value, weight, also, about)


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
