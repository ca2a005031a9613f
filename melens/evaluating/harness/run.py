"""run_task(): one generation task under one edit, through lm-eval, one saved line an answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melens.chat import Message, has_template, in_template, loses_prefix, render
from melens.errors import PromptError
from melens.evaluating.harness.data import (
    GENERATION_TASKS,
    ITEM,
    OFFLINE_TASKS,
    AnswerRow,
    Doc,
    GenerationSettings,
    data_file,
    file_key,
    gold_of,
    items,
    require_lm_eval,
    require_punkt,
)
from melens.evaluating.harness.settings import PLAIN, model_key
from melens.framing import frame_of, require_known
from melens.progress import only_errors_of
from melens.protocols import AnyModel, Options, Tokenizer, transformers_of
from melens.results import MELayer
from melens.results.edit import Edit
from melens.store import KeptRows, Refusal, RowFormat, hash_facts

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task

    from melens.evaluating.harness.model import Generator

NEUTRAL = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""Against a checkpoint's own generation settings, under which greedy would not be greedy."""
NO_ANSWERS = Refusal("{path}, line {line}, is no row of answers; name another file.")
FORMAT = 3
"""Of prompts and scores; a change makes earlier rows unfit to be pooled with new ones."""


def run_task(
    model: AnyModel,
    tokenizer: Tokenizer,
    task: str,
    *,
    edit: Edit,
    me_layer: MELayer | None,
    settings: GenerationSettings,
) -> list[AnswerRow]:
    """Generate and score a task's items under one edit; items that are saved already are read.

    Zero-shot, greedy, in the model's chat template as ``settings.chat`` says. After each batch the
    rows are on disk: the same call after a kill goes on where it stopped.

    Args:    model: a plain transformers model, or a bridge; an edit that needs a bridge bridges a
             plain one.
             task: a name of ``GENERATION_TASKS``.
             me_layer: what ``melens.locate`` gave; None only where the edit names its layers (then
             the first token is edited).
    Returns: one row an item, in the data's order.
    Raises:  UnknownNameError, PromptError, MissingPackageError, ResultError: before generating.
             PromptError too if a prompt and its answer do not fit the model's context.
             InterventionError: an edit that this model cannot follow. OutputError: disk.
    """
    check_task(task, settings)
    docs = items(task, settings.data)[: settings.limit]
    key = _run_key(model, tokenizer, task, edit, me_layer, settings)
    kept = _answers_of(settings.rows_path, key, edit.label)
    left = [number for number, doc in enumerate(docs) if doc[ITEM] not in kept.found]
    tell = settings.progress or (lambda done, total: None)
    tell(len(docs) - len(left), len(docs))
    if left:
        job = _Job(task, edit.label, key, settings)
        models = _Models(model, tokenizer, edit, me_layer)
        for rows in _answers(models, job, left, fresh=len(left) == len(docs)):
            kept.add(rows)
            tell(sum(doc[ITEM] in kept.found for doc in docs), len(docs))
    return [kept.found[doc[ITEM]] for doc in docs]


def check_task(task: str, settings: GenerationSettings) -> None:
    """Refuse what cannot be run, before any model is loaded.

    Raises:  UnknownNameError: no such task. PromptError: no data, or numbers that mean nothing.
             MissingPackageError: lm-eval, or what IFEval needs, is not installed.
    """
    known = GENERATION_TASKS[task]
    for name in ("limit", "batch_size", "max_new_tokens"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise PromptError(f"{name} must be at least 1, got {value}.")
    data_file(known.name, settings.data)
    require_lm_eval()
    if task == "ifeval":
        require_punkt()


@dataclass(frozen=True)
class _Models:
    model: AnyModel
    tokenizer: Tokenizer
    edit: Edit
    me_layer: MELayer | None

    @property
    def edited(self) -> AnyModel:
        """What the edit is entered on."""
        if self.edit.name in PLAIN:
            return self.model
        from melens.models.loading import adopt

        return adopt(self.model, tokenizer=self.tokenizer)


@dataclass(frozen=True)
class _Job:
    task: str
    condition: str
    key: str
    settings: GenerationSettings

    @property
    def length(self) -> int:
        return self.settings.max_new_tokens or GENERATION_TASKS[self.task].max_new_tokens


def _run_key(
    model: AnyModel,
    tokenizer: Tokenizer,
    task: str,
    edit: Edit,
    me_layer: MELayer | None,
    settings: GenerationSettings,
) -> str:
    """Everything an answer depends on; not how many items, nor how many at a time."""
    from lm_eval import __version__

    chat = in_template(tokenizer, settings.chat)
    return hash_facts(
        {
            "format": FORMAT,
            "lm_eval": __version__,
            "task": task,
            "model": model_key(transformers_of(model), tokenizer, edit, me_layer),
            "data": file_key(data_file(task, settings.data)),
            "length": settings.max_new_tokens or GENERATION_TASKS[task].max_new_tokens,
            **({"open_end": True} if frame_of(tokenizer).suffix else {}),
            **({"chat": False} if has_template(tokenizer) and not chat else {}),
            **({"template_alone": True} if chat and loses_prefix(tokenizer) else {}),
        }
    )


def _answers(
    models: _Models, job: _Job, left: Sequence[int], *, fresh: bool
) -> Iterable[list[AnswerRow]]:
    """Rows of the items that are left, a batch at a time; ``fresh`` if these are all items."""
    from lm_eval.tasks import TaskManager

    from melens.evaluating.edits import applied, check_held, where_held
    from melens.evaluating.harness.model import Generator
    from melens.interventions.massive import with_firsts

    edited, size = models.edited, job.settings.batch_size
    with only_errors_of("lm_eval"):
        lm = Generator(transformers_of(models.model), models.tokenizer, batch_size=size)
        manager = TaskManager(
            include_defaults=False,
            include_path=str(OFFLINE_TASKS),
            metadata={"data": str(job.settings.data)},
        )
        name = f"melens_{job.task}"
        theirs = manager.load(name)["tasks"][name]
    theirs.set_config("generation_kwargs", {"max_gen_toks": job.length, **NEUTRAL}, update=True)
    lm.chat = in_template(lm.tokenizer, job.settings.chat)
    asked = _requests(theirs, lm, left)
    prompts = [lm.tok_encode(request.args[0]) for request in asked]
    _check_prompts(lm, prompts, job)
    me_layer = models.me_layer
    if me_layer is not None and models.edit.name != "none":
        if fresh:  # of those that a killed run left, none may hold the token
            check_held(edited, me_layer, prompts)
        me_layer = with_firsts(edited, me_layer, [ids[0] for ids in prompts])
    with where_held(applied(edited, models.edit, me_layer)):
        for start in range(0, len(asked), size):
            batch = asked[start : start + size]
            answers = lm.generate_until(batch, disable_tqdm=True)
            yield [_row(theirs, job, *pair) for pair in zip(batch, answers, strict=True)]


def _requests(theirs: Task, lm: Generator, numbers: Sequence[int]) -> list[Instance]:
    """lm-eval's requests for items, their prompts in the chat template where ``lm.chat``."""
    docs = [theirs.eval_docs[number] for number in numbers]
    options: Options = {"apply_chat_template": False}
    chats: list[list[Message]] = []
    if lm.chat:

        def keep(chat: list[Message], add_generation_prompt: bool = True) -> str:
            chats.append(chat)
            return ""

        options = {"apply_chat_template": True, "chat_template": keep}
    prompts = [theirs.fewshot_context(doc, num_fewshot=0, **options) for doc in docs]
    if chats:  # all of them at once, apart from this process
        prompts = list(render(lm.tokenizer, chats))
        options["chat_template"] = lm.apply_chat_template
    made = []
    for number, doc, prompt in zip(numbers, docs, prompts, strict=True):
        metadata = (theirs.config.task, number, 1)
        request = theirs.construct_requests(doc=doc, ctx=prompt, metadata=metadata, **options)
        made.append(request[0] if isinstance(request, list) else request)
    return made


def _check_prompts(lm: Generator, rows: Sequence[Sequence[int]], job: _Job) -> None:
    """Ids that the model has, and room: lm-eval would cut off a beginning, and the first token."""
    require_known(rows, lm.model.get_input_embeddings().weight.shape[0])
    longest = max(map(len, rows))
    if longest + job.length > lm.max_length:
        raise PromptError(
            f"{job.task}'s longest prompt has {longest} tokens; with answers of {job.length} it "
            f"does not fit the model's context of {lm.max_length}; lower max_new_tokens."
        )


def _row(theirs: Any, job: _Job, request: Instance, answer: str) -> AnswerRow:
    doc: Doc = request.doc
    found = theirs.process_results(doc, [answer])
    scores, counts = {}, {}
    for metric, value in found.items():
        several = isinstance(value, (list, tuple))
        scores[metric] = sum(value) / len(value) if several else float(value)
        if several:
            counts[metric] = len(value)
    return AnswerRow(
        task=job.task,
        condition=job.condition,
        key=job.key,
        item=doc[ITEM],
        prompt=request.args[0],
        answer=answer,
        gold=gold_of(job.task, doc),
        scores=scores,
        counts=counts,
        metric=GENERATION_TASKS[job.task].primary,
    )


def _answers_of(path: Path, key: str, condition: str) -> KeptRows[str, AnswerRow]:
    """Finished rows of one condition by item; rows of others may stand in the same file.

    Raises:  ResultError: a whole line that is no row.
    """

    def read(line: str) -> AnswerRow | None:
        row = AnswerRow.model_validate_json(line)
        return row if (row.key, row.condition) == (key, condition) else None

    return KeptRows(path, RowFormat(attrgetter("item"), _line, read, NO_ANSWERS), None)


def _line(row: AnswerRow) -> str:
    return json.dumps(row.model_dump(), allow_nan=False)
