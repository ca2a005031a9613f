"""finetune(): transformers', PEFT's and TRL's own training, with the mask where it should be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from melens import __version__
from melens.errors import InterventionError, NoTokenError
from melens.evaluating.edits import applied, located_facts, where_held
from melens.finetuning.adapters import parameters_of, trainable
from melens.finetuning.callback import EmergenceCallback
from melens.finetuning.card import write_card
from melens.finetuning.keeping import (
    INFINITE,
    KEYED,
    LAST,
    LOCATED_ON,
    LOOKS,
    RESULT_FILE,
    SINK,
    SOURCE,
    KeepLosses,
    begun,
    edited_in,
    looks_in,
    losses_in,
    rank_of,
    refuse_folder,
    save,
    take_up,
    tidy,
)
from melens.finetuning.merging import read_run, write_sink
from melens.finetuning.settings import Training, training_of
from melens.finetuning.subject import LOCATED, TrainingSubject, checked, objective_of
from melens.finetuning.trainers import trainer_of
from melens.interventions.context import pass_of, recomputing
from melens.interventions.core import EditedTokens
from melens.interventions.wemask import MaskRecord
from melens.models.decoder import decoder_of
from melens.protocols import AnyModel, JsonObject, Options
from melens.provenance import RunInfo, versions
from melens.results import MELayer
from melens.results.finetune import FineTuning
from melens.results.reading import HoldsMELayer
from melens.settings import Progress, require_path
from melens.store import hash_facts, write_atomically

if TYPE_CHECKING:
    from melens.finetuning.adapters import TrainedModel


def finetune(  # noqa: PLR0913 (settings of the training come on top)
    model: str | Path,
    data: Path | str,
    how: Training | None = None,
    *,
    out: Path | str,
    held_out: Path | str | None = None,
    me_layer: HoldsMELayer | None = None,
    progress: Progress | None = None,
    **settings: object,
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
    folder = require_path("out", out)
    refuse_folder(folder)
    subject = checked(model, data, how, held_out=held_out, me_layer=me_layer)
    return run(subject, how, folder, progress=progress)


def run(
    subject: TrainingSubject, how: Training, folder: Path, *, progress: Progress | None = None
) -> FineTuning:
    """Train a model that is ready, from its last checkpoint where there is one."""
    trained, callbacks = ready(subject, how)
    facts = facts_of(subject, how)
    with first_process(how):
        checkpoint = take_up(folder, facts, hash_facts(facts[KEYED]), steps=how.steps)
        done = _finished(folder)
    if done is not None:
        return done
    look = None
    keeper = KeepLosses(folder, trained, subject.tokenizer, progress)
    callbacks.append(keeper)
    if how.method != "sink":  # the residual stream is not trained there, and stays what it was
        look = EmergenceCallback(subject.tokenizer, every=how.look_every, file=folder / LOOKS)
        callbacks.append(look)
    with begun(folder, anew=checkpoint is None):
        trainer = trainer_of(trained, subject, how, folder, callbacks)
    if look is not None and how.report_to:
        look.report = trainer.log
    with ExitStack() as stack:
        record = stack.enter_context(masked(trained, how, subject.me_layer))
        reference = getattr(trainer, "ref_model", None)
        if reference is not None:
            stack.enter_context(masked(reference, how, subject.me_layer))
        if record is not None:
            keeper.edited = record.edited
            trainer.add_callback(RequireEdited(record.edited))
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        _keep(subject, how, trained, folder)
    trainer.accelerator.wait_for_everyone()
    return read_run(folder)


def ready(subject: TrainingSubject, how: Training) -> tuple[TrainedModel, list[TrainerCallback]]:
    """The model as it is trained, and what must be told of its steps.

    Raises:  InterventionError, ModelError: what cannot be trained so.
    """
    trained = trainable(subject.hf, how, subject.me_layer, first_token=subject.first_token)
    callbacks: list[TrainerCallback] = []
    if how.remedy == "focus":
        from peft import PeftModel

        from melens.finetuning.focus import ThrowAway, add_fast_weights

        assert isinstance(trained, PeftModel)  # the remedy is of LoRA alone
        add_fast_weights(trained)
        callbacks.append(ThrowAway())
    if how.checkpointing:
        trained.gradient_checkpointing_enable(checkpointing(trained))
        trained.enable_input_require_grads()
    return trained, callbacks


class RequireEdited(TrainerCallback):
    """A mask that met no token in the first step would meet none in the rest."""

    def __init__(self, edited: EditedTokens) -> None:
        self.edited = edited

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """End the training.

        Raises:  NoTokenError: no token was edited.
        """
        if not self.edited.tokens:
            raise NoTokenError(
                "no text of the first step held a massive token, so the mask changed nothing; look "
                "at how the texts begin (chat template, BOS), or train without a mask."
            )


def _finished(folder: Path) -> FineTuning | None:
    """The result of a training that has ended; what a kill left to tidy up is."""
    if not (folder / RESULT_FILE).exists():
        return None
    tidy(folder)
    return read_run(folder)


def _keep(subject: TrainingSubject, how: Training, trained: TrainedModel, folder: Path) -> None:
    """Weights, then what is made of them, then the result; checkpoints go when all is there."""
    save(trained, folder / LAST, subject.tokenizer)
    result = _result(subject, how, trained, folder)
    if how.method == "sink" and subject.first_token is not None:
        write_sink(trained, result, subject.first_token, subject.tokenizer, folder / SINK)
    write_card(result, folder, first_token=_named(subject))
    write_atomically(folder / RESULT_FILE, result.to_json())
    tidy(folder)


def facts_of(subject: TrainingSubject, how: Training) -> JsonObject:
    """What a folder says of its training; ``KEYED`` is what a resumed one must share."""
    from accelerate import PartialState

    state = PartialState(cpu=how.device == "cpu")
    tokens, me_layer = subject.rows.tokens, subject.me_layer
    return {
        KEYED: {
            "model": subject.facts.name,
            "weights": subject.facts.weights,
            "data": subject.rows.data.sha256,
            "ids": hash_facts([tokens.ids, tokens.labels]),
            "held_out": subject.held_out and subject.held_out.data.sha256,
            "me_layer": me_layer and hash_facts(located_facts(me_layer)),
            "processes": state.num_processes,
            "melens": __version__,
            **how.facts(),
        },
        SOURCE: subject.source,
        "versions": trained_with(),
        LOCATED_ON: [list(ids) for ids in tokens.ids[:LOCATED]],
    }


def trained_with() -> dict[str, str]:
    """Versions that the weights depend on."""
    return versions() | {name: metadata.version(name) for name in ("trl", "peft", "accelerate")}


@contextmanager
def first_process(how: Training) -> Iterator[None]:
    """The first of several processes goes before the others."""
    from accelerate import PartialState

    with PartialState(cpu=how.device == "cpu").main_process_first():
        yield


def _named(subject: TrainingSubject) -> str | None:
    """The first token of every row, as text."""
    at = subject.first_token
    return None if at is None else subject.tokenizer.decode([at])


def _result(
    subject: TrainingSubject, how: Training, trained: TrainedModel, folder: Path
) -> FineTuning:
    tokens, held = subject.rows.tokens, subject.held_out
    losses = losses_in(folder)
    ranked = [row for row in losses if rank_of(row) < INFINITE]
    best = min(ranked, key=rank_of).step if ranked else None
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
        edited_tokens=edited_in(folder),
        losses=losses,
        looks=looks_in(folder),
        best_step=best,
        run=_run_info(subject, how),
    )


def _run_info(subject: TrainingSubject, how: Training) -> RunInfo:
    names = ("batch_size", "accumulate", "max_tokens", "packing", "checkpointing", "bf16")
    settings: JsonObject = {name: getattr(how, name) for name in names}
    settings |= {"learning_rate": f"{how.rate:g}", "chat": subject.rows.tokens.chat}
    run = RunInfo.collect(subject.facts, seed=how.seed, settings=settings)
    return run.model_copy(update={"versions": trained_with()})


@contextmanager
def masked(model: AnyModel, how: Training, me_layer: MELayer | None) -> Iterator[MaskRecord | None]:
    """The mask in force on a model in training; nothing where it is off, or where the first token
    is no token any more but a trained key and value.

    It is on in every pass of the model: forward, evaluation, and blocks that gradient
    checkpointing computes again.
    """  # noqa: D205
    if not how.trains_masked or how.method == "sink":
        yield None
        return
    with where_held(applied(model, how.mask, me_layer)) as record:
        yield record if isinstance(record, MaskRecord) else None


def checkpointing(model: AnyModel) -> Options:
    """Settings of torch's gradient checkpointing under which a block that is computed again sees
    the tokens of the pass it belongs to, whatever ran in between.
    """  # noqa: D205
    inner = decoder_of(model).model

    def contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        try:
            seen = pass_of(inner)
        except InterventionError:  # no edit is open
            return nullcontext(), nullcontext()
        return nullcontext(), recomputing(inner, seen)

    return {"use_reentrant": False, "context_fn": contexts}
