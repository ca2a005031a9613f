"""finetune(): transformers', PEFT's and TRL's own training, with the mask where it should be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from melens import __version__
from melens.errors import InterventionError
from melens.evaluating.edits import applied, where_held
from melens.finetuning.adapters import parameters_of, trainable
from melens.finetuning.callback import EmergenceCallback
from melens.finetuning.card import write_card
from melens.finetuning.keeping import (
    LAST,
    LOCATED_ON,
    LOOKS,
    LOSSES,
    RESULT_FILE,
    SINK,
    SOURCE,
    KeepLosses,
    cut_rows,
    looks_in,
    losses_in,
    save,
    take_up,
    tidy,
)
from melens.finetuning.merging import read_run, write_sink
from melens.finetuning.settings import Training, training_of
from melens.finetuning.subject import LOCATED, TrainingSubject, checked, objective_of
from melens.finetuning.trainers import trainer_of
from melens.interventions.context import pass_of, recomputing
from melens.models.decoder import decoder_of
from melens.provenance import RunInfo
from melens.results import MELayer
from melens.results.finetune import FineTuning
from melens.settings import Progress
from melens.store import hash_facts, write_atomically


def finetune(  # noqa: PLR0913 (settings of the training come on top)
    model: str | Path,
    data: Path | str,
    how: Training | None = None,
    *,
    out: Path | str,
    held_out: Path | str | None = None,
    me_layer: MELayer | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> FineTuning:
    """Fine-tune a model with a mask in force where it should be, and watch its ME Layer.

    The loop is TRL's. Interrupted, the same call goes on from the last whole checkpoint and ends
    with the same weights.

    Args:    model: a name, a folder or a hub id.
             data: JSON lines, see :func:`melens.finetuning.data.read_training_data`.
             how: all settings as one object; ``settings`` are its fields as words, which win:
             ``finetune(model, data, method="lora", mask=Edit(rate=0.25), out=folder)``.
             out: a folder of its own: settings, losses, looks at the ME Layer, weights (``last``,
             and ``best`` with held-out rows), the result as ``finetune.json``.
             held_out: more rows of the same kind, on which the best weights are chosen.
             me_layer: what ``melens.locate`` found on this model; None = locate where needed, on
             the first rows.
             progress: called with (steps done, steps in all).
    Raises:  PromptError: a bad line of the data, before any weights are loaded. ResultError: a
             folder of another training, or a ME Layer of another model. InterventionError: settings
             that cannot be meant. ModelNotFoundError, WeightsError, ModelError: no such model.
    """
    how = training_of(how, settings)
    subject = checked(model, data, how, held_out=held_out, me_layer=me_layer)
    return run(subject, how, Path(out), progress=progress)


def run(
    subject: TrainingSubject, how: Training, folder: Path, *, progress: Progress | None = None
) -> FineTuning:
    """Train a model that is ready, from its last checkpoint where there is one."""
    checkpoint = _take_up(subject, how, folder)
    if (folder / RESULT_FILE).exists():
        return read_run(folder)
    trained = trainable(subject.hf, how, subject.me_layer, first_token=subject.first_token)
    callbacks: list[Any] = []
    if how.remedy == "focus":
        from melens.finetuning.focus import ThrowAway, add_fast_weights

        add_fast_weights(trained)
        callbacks.append(ThrowAway())
    if how.checkpointing:
        trained.gradient_checkpointing_enable(checkpointing(trained))
        trained.enable_input_require_grads()
    callbacks.append(KeepLosses(folder, trained, subject.tokenizer, progress))
    look = None
    if how.method != "sink":  # the residual stream is not trained there, and stays what it was
        look = EmergenceCallback(subject.tokenizer, every=how.look_every, file=folder / LOOKS)
        callbacks.append(look)
    trainer = trainer_of(trained, subject, how, folder, callbacks)
    if look is not None and how.report_to:
        look.report = trainer.log
    with ExitStack() as stack:
        for model in (trained, getattr(trainer, "ref_model", None)):
            if model is not None:
                stack.enter_context(masked(model, how, subject.me_layer))
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    trainer.accelerator.wait_for_everyone()
    result = None
    if trainer.accelerator.is_main_process:
        save(trained, folder / LAST, subject.tokenizer)
        result = _result(subject, how, trained, folder)
        tidy(folder)
        if how.method == "sink" and subject.first_token is not None:
            write_sink(trained, result, subject.first_token, subject.tokenizer, folder / SINK)
        write_card(result, folder, first_token=_named(subject))
        write_atomically(folder / RESULT_FILE, result.to_json())
    trainer.accelerator.wait_for_everyone()
    return result or _result(subject, how, trained, folder)


def _take_up(subject: TrainingSubject, how: Training, folder: Path) -> Path | None:
    """Begin or find the folder, in the first of several processes before the others."""
    from accelerate import PartialState

    facts = {
        "model": subject.facts.name,
        "weights": subject.facts.weights,
        "data": subject.rows.data.sha256,
        "held_out": subject.held_out and subject.held_out.data.sha256,
        "me_layer": subject.me_layer and subject.me_layer.me_layer,
        "melens": __version__,
        **how.facts(),
    }
    state = PartialState(cpu=how.device == "cpu")
    with state.main_process_first():
        more = {
            SOURCE: subject.source,
            LOCATED_ON: [list(ids) for ids in subject.rows.tokens.ids[:LOCATED]],
        }
        checkpoint = take_up(folder, {**facts, **more}, hash_facts(facts))
        done = 0 if checkpoint is None else int(checkpoint.name.split("-")[1])
        if state.is_main_process:
            for name in (LOSSES, LOOKS):
                cut_rows(folder / name, done)
    return checkpoint


def _named(subject: TrainingSubject) -> str | None:
    """The first token of every row, as text."""
    at = subject.first_token
    return None if at is None else subject.tokenizer.decode([at])


def _result(subject: TrainingSubject, how: Training, trained: Any, folder: Path) -> FineTuning:
    tokens, held = subject.rows.tokens, subject.held_out
    losses = losses_in(folder)
    known = [row for row in losses if row.held_out is not None]
    best = min(known, key=lambda row: row.held_out or 0.0).step if known else None
    return FineTuning(
        objective=objective_of(subject.rows.data, how),
        method=how.method,
        at=how.at,
        mask=how.mask,
        masked_in=how.masked_in,
        remedy=how.remedy,
        me_layer=subject.me_layer and subject.me_layer.me_layer,
        steps=how.steps,
        trained=parameters_of(trained),
        of=subject.numbers,
        texts=len(tokens.ids),
        tokens=tokens.tokens,
        too_long=len(tokens.too_long),
        held_out=0 if held is None else len(held.tokens.ids),
        data=subject.rows.data.sha256,
        losses=losses,
        looks=looks_in(folder),
        best_step=best,
        run=RunInfo.collect(
            subject.facts,
            seed=how.seed,
            settings={
                "batch_size": how.batch_size,
                "accumulate": how.accumulate,
                "learning_rate": f"{how.rate:g}",
                "max_tokens": how.max_tokens,
                "packing": how.packing,
                "checkpointing": how.checkpointing,
                "bf16": how.bf16,
                "chat": tokens.chat,
            },
        ),
    )


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
