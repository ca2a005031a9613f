"""finetune(): transformers', PEFT's and TRL's own training, with the mask where it should be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melens import __version__
from melens.errors import InterventionError
from melens.evaluating.edits import applied, where_held
from melens.finetuning.adapters import parameters_of, trainable
from melens.finetuning.callback import EmergenceCallback
from melens.finetuning.card import write_card
from melens.finetuning.data import TrainingData, read_training_data, tokenise
from melens.finetuning.keeping import (
    LAST,
    LOCATED_ON,
    LOOKS,
    LOSSES,
    RESULT_FILE,
    SINK,
    SOURCE,
    Keeper,
    cut_rows,
    looks_in,
    losses_in,
    save,
    take_up,
    tidy,
)
from melens.finetuning.merging import read_run, write_sink
from melens.finetuning.rewards import reward_of
from melens.finetuning.settings import Training, training_of
from melens.finetuning.trainers import Rows, objective_of, trainer_of
from melens.inputs import prepare
from melens.interventions.context import pass_of, recomputing
from melens.locating import locate
from melens.measuring.located import check_same_model
from melens.models.decoder import decoder_of
from melens.models.loading import adopt, load_plain
from melens.models.origin import Origin, fingerprint, remember
from melens.models.view import view_of
from melens.provenance import ModelFacts, RunInfo
from melens.results import MELayer
from melens.results.finetune import FineTuning
from melens.settings import Progress
from melens.store import hash_facts, write_atomically

LOCATED = 8
"""Rows of the training data that the ME Layer is located on."""


@dataclass
class Subject:
    """A model that is about to be trained, and what on."""

    hf: Any
    tokenizer: Any
    facts: ModelFacts
    source: str
    """What the model is loaded by again: a path of a folder is whole."""
    numbers: int
    """Of the model, before anything is put around it."""
    me_layer: MELayer | None
    rows: Rows
    held_out: Rows | None

    @property
    def first_token(self) -> int | None:
        """The token that every row starts with; None where they differ."""
        firsts = {ids[0] for ids in self.rows.tokens.ids}
        return firsts.pop() if len(firsts) == 1 else None


def finetune(
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


def checked(
    model: str | Path,
    data: Path | str,
    how: Training,
    *,
    held_out: Path | str | None = None,
    me_layer: MELayer | None = None,
) -> Subject:
    """Everything that can be refused, refused; then the model with its rows.

    Raises:  as :func:`finetune`.
    """
    rows = read_training_data(data)
    others = None if held_out is None else read_training_data(held_out)
    for read in (rows, others):
        if read is not None:
            _check_fits(how, read)
    return _subject_of(model, rows, others, how, me_layer)


def _check_fits(how: Training, rows: TrainingData) -> None:
    """Refuse rows that the objective cannot use, before any weights are loaded."""
    objective = objective_of(rows, how)
    pairs = rows.kind == "preference"
    if pairs != (objective == "dpo"):
        needs = "prompt, chosen and rejected" if objective == "dpo" else "one answer a row"
        raise InterventionError(
            f"{objective} needs rows with {needs}; {rows.path} has {rows.kind}."
        )
    if objective == "grpo":
        reward_of(how.reward)
    training_of(how, {"objective": objective})  # what excludes an objective, where none was named


def _subject_of(
    model: str | Path,
    data: TrainingData,
    held_out: TrainingData | None,
    how: Training,
    me_layer: MELayer | None,
) -> Subject:
    """Load the model, tokenise, and locate where that is needed."""
    hf, tokenizer, origin = load_plain(model, device=how.device)

    def tokens(of: TrainingData) -> Rows:
        return Rows(of, tokenise(of, tokenizer, max_tokens=how.max_tokens, chat=how.chat))

    rows = tokens(data)
    bridge = adopt(view_of(hf), tokenizer=tokenizer)
    remember(bridge, Origin(origin.name, revision=origin.revision))
    texts = [list(ids) for ids in rows.tokens.ids[:LOCATED]]
    if me_layer is not None:
        check_same_model(prepare(bridge, texts), me_layer)
    elif how.mask.name != "none" or how.at == "me-layer":
        me_layer = locate(bridge, texts)
    first = next(hf.parameters())
    facts = ModelFacts(
        name=origin.name,
        revision=origin.revision,
        weights=fingerprint(bridge),
        dtype=str(first.dtype).removeprefix("torch."),
        device=str(first.device),
    )
    local = Path(model).expanduser()
    return Subject(
        hf,
        tokenizer,
        facts,
        str(local.absolute()) if local.exists() else str(model),
        sum(value.numel() for value in hf.parameters()),
        me_layer,
        rows,
        held_out and tokens(held_out),
    )


def run(
    subject: Subject, how: Training, folder: Path, *, progress: Progress | None = None
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
    callbacks.append(Keeper(folder, trained, subject.tokenizer, progress))
    look = None
    if how.method != "sink":  # the residual stream is not trained there, and stays what it was
        look = EmergenceCallback(subject.tokenizer, every=how.look_every, file=folder / LOOKS)
        callbacks.append(look)
    trainer = trainer_of(
        trained, subject.tokenizer, subject.rows, subject.held_out, how, folder, callbacks
    )
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


def _take_up(subject: Subject, how: Training, folder: Path) -> Path | None:
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


def _named(subject: Subject) -> str | None:
    """The first token of every row, as text."""
    at = subject.first_token
    return None if at is None else subject.tokenizer.decode([at])


def _result(subject: Subject, how: Training, trained: Any, folder: Path) -> FineTuning:
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
