"""finetune(): transformers', PEFT's and TRL's own training, with the mask where it should be."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from melens.errors import InterventionError, ResultError
from melens.evaluating.edits import applied, where_held
from melens.finetuning.adapters import parameters_of, trainable
from melens.finetuning.callback import EmergenceCallback
from melens.finetuning.data import TokenRows, TrainingData, read_training_data, tokenise
from melens.finetuning.settings import Training
from melens.interventions.context import now_of, recomputing
from melens.locating import locate
from melens.models.decoder import decoder_of
from melens.models.loading import load_plain
from melens.models.view import view_of
from melens.results import MELayer

LOSSES, LOOKS, CHECKPOINTS = "losses.jsonl", "emergence.jsonl", "checkpoints"


@dataclass
class Subject:
    """A model that is about to be trained."""

    hf: Any
    tokenizer: Any
    name: str
    me_layer: MELayer | None
    rows: TokenRows
    held_out: TokenRows | None


def prepare(
    model: str | Path,
    data: TrainingData,
    how: Training,
    *,
    held_out: TrainingData | None = None,
    me_layer: MELayer | None = None,
) -> Subject:
    """Load a model, locate where that is needed, and tokenise; nothing is trained."""
    hf, tokenizer, origin = load_plain(model)
    chat = how.chat
    rows = tokenise(data, tokenizer, max_tokens=how.max_tokens, chat=chat)
    others = (
        None
        if held_out is None
        else tokenise(held_out, tokenizer, max_tokens=how.max_tokens, chat=chat)
    )
    if me_layer is None and (how.mask.name != "none" or how.at == "me-layer"):
        batches = [torch.tensor([ids]) for ids in rows.ids[:8]]
        me_layer = locate(view_of(hf), [ids[0].tolist() for ids in batches])
    return Subject(hf, tokenizer, origin.name, me_layer, rows, others)


@contextmanager
def masked(model: Any, how: Training, me_layer: MELayer | None, *, now: bool) -> Iterator[Any]:
    """The mask in force on a model that is trained or evaluated; nothing where it is off.

    It is on in every pass of the model: forward, evaluation, and blocks that gradient
    checkpointing computes again.
    """
    if not now:
        yield None
        return
    with where_held(applied(model, how.mask, me_layer)) as record:
        yield record


def checkpointing(model: Any) -> dict[str, Any]:
    """Settings of torch's gradient checkpointing under which a block that is computed again sees
    the tokens of the pass it belongs to, whatever ran in between.
    """  # noqa: D205
    inner = decoder_of(model).model

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        try:
            seen = now_of(inner)
        except InterventionError:  # no edit is open
            return nullcontext(), nullcontext()
        return nullcontext(), recomputing(inner, seen)

    return {"use_reentrant": False, "context_fn": contexts}
