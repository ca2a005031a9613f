"""The tasks that generate answers, and one saved line per answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from melens.registry import Registry
from melens.results.base import Part


@dataclass(frozen=True)
class GenerationTask:
    """One task whose answers are generated and scored item by item."""

    name: str
    about: str
    unit: str
    """Of every score."""
    higher_is_better: bool
    """For the primary metric."""
    file: str
    """Data file, relative to the data folder."""
    max_new_tokens: int
    """Default limit of an answer, in tokens."""
    primary: str
    """The metric that stands for the task; an item that has no such score does not count in it."""
    others: tuple[str, ...]
    """Metrics reported beside it."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric, the primary one first."""
        return (self.primary, *self.others)


GENERATION_TASKS: Registry[GenerationTask] = Registry("task")
for _task in (
    GenerationTask(
        "gsm8k", "grade school word problems, the final number", "share correct", True,
        "gsm8k/test.jsonl", 512, "strict", ("lm_eval_strict_match", "lm_eval_flexible_extract"),
    ),
    GenerationTask(
        "math500", "competition mathematics, the boxed answer", "share correct", True,
        "math500/test.jsonl", 1024, "strict", ("lm_eval_exact_match",),
    ),
    GenerationTask(
        "ifeval", "instructions whose following a program can check", "share followed", True,
        "ifeval/input_data.jsonl", 1280, "prompt_level_strict_acc",
        ("inst_level_strict_acc", "prompt_level_loose_acc", "inst_level_loose_acc"),
    ),
    GenerationTask(
        "xstest",
        "refusals of harmless prompts (primary) and of harmful ones, 25 of a kind in turn",
        "share refused", False, "xstest/xstest_prompts.csv", 128, "refused_safe",
        ("refused_unsafe",),
    ),
):  # fmt: skip
    GENERATION_TASKS.add(_task.name, _task)


@dataclass(frozen=True)
class GenerationSettings:
    """How a generation task is run; what does not change an answer is not part of its key."""

    data: Path
    """Folder that holds the task's data file (``GenerationTask.file``)."""
    rows_path: Path
    """JSON lines, appended to; one file may hold several conditions and tasks."""
    limit: int | None = None
    """First so many items; None = all."""
    batch_size: int = 1
    max_new_tokens: int | None = None
    """None = the task's own."""
    progress: Callable[[int, int], None] | None = None
    """Called with (items done, items) after each batch."""


class ItemRow(Part):
    """One answer of one model under one edit, with its scores."""

    task: str
    condition: str
    """Label of the edit, ``none`` without one."""
    key: str
    """Hash of model, edit, task data, prompt format, length: equal keys may be pooled."""
    item: str
    """The data's own id of the item, else its line number from 0."""
    prompt: str
    """Exactly as the model saw it, chat template included."""
    answer: str
    gold: str | None
    """None where no single answer is right."""
    scores: dict[str, float]
    """Metric to score from 0 to 1; only those that mean something for this item."""
    counts: dict[str, int]
    """Metric to the number of judgements its score averages, where that is not 1."""
    metric: str
    """The task's primary metric."""


def mean_score(rows: Iterable[ItemRow], metric: str) -> float | None:
    """Mean of a metric over the items that have it, weighted by ``counts``; None without any."""
    found = [
        (row.scores[metric], row.counts.get(metric, 1)) for row in rows if metric in row.scores
    ]
    total = sum(count for _, count in found)
    return sum(score * count for score, count in found) / total if total else None
