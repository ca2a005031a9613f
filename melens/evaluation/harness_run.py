"""run_task(): one generation task under one edit, through lm-eval, a line an item."""

from __future__ import annotations

from typing import Any

from melens.evaluation.harness_rows import GenerationSettings, ItemRow
from melens.results import MELayer
from melens.results.edit import Edit


def run_task(
    model: Any,
    tokenizer: Any,
    task: str,
    *,
    edit: Edit,
    me_layer: MELayer | None,
    settings: GenerationSettings,
) -> list[ItemRow]:
    """Generate and score a task's items under one edit; items that are saved already are read.

    Args:    model: a plain transformers model, or a bridge.
             task: a name of ``GENERATION_TASKS``.
             me_layer: what ``melens.locate`` gave; None only where the edit names its layers.
    Returns: one row an item, in the data's order.
    """
    raise NotImplementedError
