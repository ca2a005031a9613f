"""Tasks whose answers are generated, brought into the same rows and the same result."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from melens.batches import Batch
from melens.capture import evaluating
from melens.chat import in_template, task_prompt_ids, template_key
from melens.errors import ResultError
from melens.evaluating.edits import EditCondition, applied, where_held
from melens.evaluating.forced import MassiveIn
from melens.evaluating.harness.data import AnswerRow as Answer
from melens.evaluating.harness.data import GenerationSettings, GenerationTask, file_key, items
from melens.evaluating.harness.run import run_task
from melens.evaluating.scores import ENERGY, Setup, TaskCard, assembled, held_facts
from melens.evaluating.sources import data_folder
from melens.framing import bos_first
from melens.interventions import MaskRecord
from melens.interventions.massive import MassiveRule, massive_tokens, with_firsts
from melens.item_rows import ItemRow, Rows
from melens.placement import input_device
from melens.protocols import JsonObject
from melens.results.evaluation import Evaluation
from melens.settings import Items
from melens.store import remove_file

PROBES = 4
"""Prompts that the masked energy is measured on: it belongs to the massive token, not to them."""


def generated(bench: Setup, task: GenerationTask, chosen: Items) -> Evaluation:
    """Generate under every condition in turn, what an earlier run finished left out.

    Raises:  as ``melens.evaluating.harness.run.run_task``.
    """
    folder = data_folder(task, chosen)
    order = [str(doc["item_id"]) for doc in items(task.name, folder)[: chosen.n]]
    length = bench.run.max_new_tokens or task.max_new_tokens
    data = file_key(folder / task.file)
    tokenizer = bench.model.tokenizer
    template = template_key(tokenizer, chat=chosen.chat)
    rows = Rows(
        bench.run.keep,
        bench.facts(task=task.name, items=order, data=data, length=length, template=template),
    )
    with tempfile.TemporaryDirectory() as nowhere:
        path = bench.run.keep
        part = Path(nowhere) / "answers" if path is None else answers_beside(path)
        job = _Generation(bench, task, folder, part, len(order), chosen.chat)
        for step, condition in enumerate(bench.conditions):
            if not all(rows.has(item, condition.name) for item in order):
                rows.add(job.rows(condition, step))
            if bench.run.progress is not None:
                bench.run.progress((step + 1) * len(order), len(bench.conditions) * len(order))
        remove_file(part)  # all of it is in the rows now
    used = in_template(tokenizer, chosen.chat)
    chat = "in the chat template" if used else "no chat template"
    about = (
        f"{task.about}: answers of at most {length} tokens, greedy, zero shots, {chat}; "
        f"the value is {task.primary}."
    )
    asked = [str(row.about["prompt"]) for row in rows.of(bench.conditions[0].name).values()]
    ids = [task_prompt_ids(tokenizer, prompt, chat=chosen.chat) for prompt in asked]
    start = bos_first(tokenizer, ids)
    card = TaskCard(
        task.name,
        task.unit,
        task.higher_is_better,
        about[0].upper() + about[1:],
        {"data": task.file, "length": length, "bos_first": start},
    )
    return assembled(bench, card, rows, order)


def answers_beside(items_file: Path) -> Path:
    """Where the answers of a condition that is not finished are kept."""
    return items_file.with_name(f"{items_file.stem}.unfinished.jsonl")


class _Generation:
    """One task, condition by condition."""

    def __init__(
        self,
        bench: Setup,
        task: GenerationTask,
        folder: Path,
        part: Path,
        count: int,
        chat: bool | None,
    ) -> None:
        self.bench, self.task, self.count, self.chat = bench, task, count, chat
        self.folder, self.part = folder, part

    def rows(self, condition: EditCondition, step: int) -> list[ItemRow]:
        """One condition's rows, with the masked energy where the edit is a mask."""
        run = self.bench.run
        total = self.count * len(self.bench.conditions)

        def tell(done: int, _: int) -> None:
            if run.progress is not None:
                run.progress(step * self.count + done, total)

        answers = run_task(
            self.bench.model,
            self.bench.model.tokenizer,
            self.task.name,
            edit=condition.edit,
            me_layer=self.bench.me_layer,
            settings=GenerationSettings(
                self.folder,
                self.part,
                limit=self.count,
                batch_size=run.batch_size,
                max_new_tokens=run.max_new_tokens,
                chat=self.chat,
                progress=tell,
            ),
        )
        tokenizer = self.bench.model.tokenizer
        ids = [task_prompt_ids(tokenizer, answer.prompt, chat=self.chat) for answer in answers]
        energy = masked_energy(self.bench, condition, ids[:PROBES])
        rows = [row_of(answer, condition.name, self.task, energy) for answer in answers]
        if condition.role == "base":
            for row, found in zip(rows, massive_in(self.bench, ids), strict=True):
                row.about.update(held_facts(found))
        return rows


def row_of(
    answer: Answer, condition: str, task: GenerationTask, energy: float | None = None
) -> ItemRow:
    """An answer as one row; an item without the primary metric has weight 0.

    Raises:  ResultError: the answer is of another task.
    """
    if answer.task != task.name:
        raise ResultError(f"an answer of {answer.task} is none of {task.name}.")
    also = {
        name: (score, float(answer.counts.get(name, 1)))
        for name, score in answer.scores.items()
        if name != task.primary
    }
    if energy is not None:
        also[ENERGY] = (energy, 1.0)
    held = task.primary in answer.scores
    weight = float(answer.counts.get(task.primary, 1)) if held else 0.0
    about: JsonObject = {"prompt": answer.prompt, "answer": answer.answer, "gold": answer.gold}
    value = answer.scores.get(task.primary, 0.0)
    return ItemRow(answer.item, condition, value, weight, also, about)


PromptIds = Sequence[Sequence[int]]


@torch.no_grad()
def masked_energy(bench: Setup, condition: EditCondition, rows: PromptIds) -> float | None:
    """Mean masked share of the massive token's energy over prompts; None for other edits."""
    if condition.edit.name != "wemask" or not rows:
        return None
    model = bench.model
    me_layer = bench.me_layer and with_firsts(model, bench.me_layer, [row[0] for row in rows])
    edit = where_held(applied(model, condition.edit, me_layer))
    with edit as record, evaluating(model):
        for ids in rows:
            model(Batch.pad([ids]).ids.to(input_device(model)))
    return record.mean_energy if isinstance(record, MaskRecord) else None


def massive_in(bench: Setup, rows: PromptIds) -> list[MassiveIn | None]:
    """The massive tokens of every prompt, one unedited pass each, up to the ME Layer."""
    if bench.me_layer is None:
        return [None] * len(rows)
    median = MassiveRule.of(bench.me_layer).median_norm
    batches = [Batch.pad([ids]) for ids in rows]
    found = massive_tokens(bench.model, bench.me_layer, batches)
    return [MassiveIn.of(marks[0], sizes[:, 0], median) for marks, sizes in found]
