"""finetune(): transformers', PEFT's and TRL's own training, with the mask where it should be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from melens import __version__
from melens.errors import InterventionError
from melens.evaluating.edits import applied, where_held
from melens.finetuning.adapters import parameters_of, trainable
from melens.finetuning.callback import EmergenceCallback
from melens.finetuning.data import TokenRows, TrainingData, read_training_data, tokenise
from melens.finetuning.keeping import LAST, LOOKS, LOSSES, Keeper, cut_rows, save, take_up, tidy
from melens.finetuning.settings import Training
from melens.finetuning.trainers import require_uncompiled, sft_trainer
from melens.interventions.context import pass_of, recomputing
from melens.locating import locate
from melens.models.decoder import decoder_of
from melens.models.loading import load_plain
from melens.models.view import view_of
from melens.results import MELayer
from melens.store import hash_facts


@dataclass
class Subject:
    """A model that is about to be trained, and what on."""

    hf: Any
    tokenizer: Any
    name: str
    me_layer: MELayer | None
    rows: TokenRows
    held_out: TokenRows | None


def finetune(
    model: str | Path,
    data: Path | str,
    how: Training,
    *,
    out: Path | str,
    held_out: Path | str | None = None,
    me_layer: MELayer | None = None,
) -> Path:
    """Fine-tune a model with a mask in force where ``how`` says, and watch its ME Layer.

    The loop is TRL's. Interrupted, the same call goes on from the last whole checkpoint.

    Args:    model: a name, a folder or a hub id.
             data: JSON lines, see :func:`melens.finetuning.data.read_training_data`.
             out: a folder of its own: settings, losses, looks at the ME Layer, weights.
             held_out: more of the same, on which the best weights are chosen.
             me_layer: what ``melens.locate`` found on this model; None = locate where needed.
    Returns: the folder of the last weights.
    Raises:  PromptError: a bad line of the data, before any weights are loaded. ResultError: a
             folder of another training. InterventionError: settings that cannot be meant.
    """
    rows = read_training_data(data)
    others = None if held_out is None else read_training_data(held_out)
    folder = Path(out)
    subject = _subject(model, rows, others, how, me_layer)
    facts = {"model": subject.name, "data": rows.sha256, "melens": __version__, **how.facts()}
    checkpoint = take_up(folder, facts, hash_facts(facts))
    done = 0 if checkpoint is None else int(checkpoint.name.split("-")[1])
    for name in (LOSSES, LOOKS):
        cut_rows(folder / name, done)
    trained = trainable(subject.hf, how, subject.me_layer, first_token=_first(subject.rows))
    require_uncompiled(trained)
    if how.checkpointing:
        trained.gradient_checkpointing_enable(checkpointing(trained))
        trained.enable_input_require_grads()
    look = EmergenceCallback(subject.tokenizer, every=how.look_every, file=folder / LOOKS)
    callbacks = [Keeper(folder, trained), look]
    trainer = sft_trainer(
        trained, subject.tokenizer, subject.rows, subject.held_out, how, folder, callbacks
    )
    with masked(trained, how, subject.me_layer):
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    save(trained, folder / LAST)
    tidy(folder)
    return folder / LAST


def _subject(
    model: str | Path,
    data: TrainingData,
    held_out: TrainingData | None,
    how: Training,
    me_layer: MELayer | None,
) -> Subject:
    """Load the model, tokenise, and locate where that is needed."""
    hf, tokenizer, origin = load_plain(model)

    def tokens(of: TrainingData) -> TokenRows:
        return tokenise(of, tokenizer, max_tokens=how.max_tokens, chat=how.chat)

    rows = tokens(data)
    if me_layer is None and (how.mask.name != "none" or how.at == "me-layer"):
        me_layer = locate(view_of(hf), [list(ids) for ids in rows.ids[:LOCATED]])
    return Subject(
        hf, tokenizer, origin.name, me_layer, rows, held_out and tokens(held_out)
    )


LOCATED = 8
"""Rows of the training data that the ME Layer is located on."""


def _first(rows: TokenRows) -> int | None:
    """The token that every row starts with; None where they differ."""
    firsts = {ids[0] for ids in rows.ids}
    return firsts.pop() if len(firsts) == 1 else None


@contextmanager
def masked(model: Any, how: Training, me_layer: MELayer | None) -> Iterator[Any]:
    """The mask in force on a model in training; nothing where it is off, or where the first token
    is no token any more but a trained key and value.

    It is on in every pass of the model: forward, evaluation, and blocks that gradient
    checkpointing computes again.
    """  # noqa: D205
    if not how.trains_masked or how.method == "sink":
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
            seen = pass_of(inner)
        except InterventionError:  # no edit is open
            return nullcontext(), nullcontext()
        return nullcontext(), recomputing(inner, seen)

    return {"use_reentrant": False, "context_fn": contexts}
