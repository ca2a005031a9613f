"""finetune: refuse early, train, show what became of the model."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from melens.cli import options as opt
from melens.cli import output
from melens.cli.groups import without
from melens.cli.listing import Listing
from melens.cli.render import say_json, show_listings
from melens.errors import InterventionError, ModelError, PromptError
from melens.progress import progress_on, remark
from melens.protocols import Options

if TYPE_CHECKING:
    from melens.finetuning.settings import Training
    from melens.results import MELayer
    from melens.results.edit import Edit


class MethodKind(StrEnum):
    """What is trained."""

    lora = "lora"
    full = "full"
    sink = "sink"


class AtKind(StrEnum):
    """Where it is trained."""

    all = "all"
    me_layer = "me-layer"


class MaskedKind(StrEnum):
    """When the mask is in force."""

    training = "training"
    inference = "inference"
    both = "both"


class RemedyKind(StrEnum):
    """What is done about long contexts."""

    none = "none"
    focus = "focus"


class ObjectiveKind(StrEnum):
    """What is trained for."""

    sft = "sft"
    dpo = "dpo"
    grpo = "grpo"


@dataclass(frozen=True)
class TrainingOptions:
    """What is trained, for how long: fields of ``melens.finetuning.Training``."""

    method: Annotated[
        MethodKind,
        typer.Option(
            help="lora: low-rank adapters. full: every weight. sink: one key and value a layer, "
            "in place of the first token."
        ),
    ] = MethodKind.lora
    at: Annotated[
        AtKind,
        typer.Option(help="all layers, or the ME Layer's FFN and the norm it reads through."),
    ] = AtKind.all
    objective: Annotated[
        ObjectiveKind | None,
        typer.Option(
            help="sft: the answer's tokens. dpo: the better of two answers. grpo: the model's own "
            "answers, by --reward. Default: dpo for pairs of answers, else sft."
        ),
    ] = None
    remedy: Annotated[
        RemedyKind,
        typer.Option(help="focus: fast weights under a two-way context (FocuSFT), for long texts."),
    ] = RemedyKind.none
    masked_in: Annotated[
        MaskedKind,
        typer.Option(help="Where a mask (--mask-...) is in force: training, inference, or both."),
    ] = MaskedKind.both
    steps: Annotated[int, typer.Option(min=1, help="Of the optimiser.")] = 100
    accumulate: Annotated[int, typer.Option(min=1, help="Batches a step.")] = 1
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Falls to 0. Default: 2e-4 (lora), 2e-5 (full), 1e-2 (sink)."),
    ] = None
    max_tokens: Annotated[
        int, typer.Option(min=4, help="Longer rows are left out and counted, never cut.")
    ] = 256
    rank: Annotated[int, typer.Option(min=1, help="Of lora.")] = 8
    packing: Annotated[
        bool, typer.Option("--packing", help="Several texts a row, none of which sees another.")
    ] = False
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute blocks again in the backward pass.")
    ] = False
    bf16: Annotated[bool, typer.Option("--bf16", help="Autocast to bfloat16.")] = False
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="The chat template (default: where the tokenizer has one)."
        ),
    ] = None
    chat_template: Annotated[
        Path | None, typer.Option(help="A file with a template, in place of the tokenizer's.")
    ] = None
    reward: Annotated[
        str, typer.Option(help="Of grpo: math (the strict scorer), or module:function.")
    ] = "math"
    generations: Annotated[int, typer.Option(min=2, help="Answers a prompt, of grpo.")] = 4
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer, for grpo.")] = 64
    save_every: Annotated[
        int, typer.Option(min=1, help="Steps between checkpoints, and between held-out losses.")
    ] = 50
    look_every: Annotated[
        int,
        typer.Option(
            min=1,
            help="Steps between two looks at the ME Layer; one that would bring their share of the "
            "time over 5 % waits.",
        ),
    ] = 20
    report_to: Annotated[
        list[str] | None, typer.Option(help="A tracker of transformers, e.g. tensorboard.")
    ] = None


@dataclass(frozen=True)
class TrainRun(opt.RunOptions):
    """Its seed is of the training."""

    seed: Annotated[
        int,
        typer.Option(min=0, max=2**32 - 1, help="Of the adapters, the order of rows, and draws."),
    ] = 0


def finetune(
    model: opt.Model,
    *,
    data: Annotated[
        Path,
        typer.Option(
            help="JSON lines: messages; prompt and completion; question and answer; or prompt, "
            "chosen and rejected."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="A new folder, or that of the same training, which goes on."
        ),
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="More such rows: the best weights are chosen on them.")
    ] = None,
    training: TrainingOptions,
    edit: Annotated[opt.EditOptions, without("edit")],
    located: opt.Located = None,
    merge: Annotated[
        Path | None,
        typer.Option(help="Write the trained model as one folder too, its mask with it."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, and train nothing.")
    ] = False,
    as_json: opt.Json = False,
    run: Annotated[TrainRun, without("dtype", "revision", "trust_remote_code", *opt.PLACED)],
) -> None:
    """Fine-tune MODEL with a mask in force, and watch what becomes of its ME Layer.

    The training is TRL's (the extra train). With --mask-rate, --mask-select and the like a mask is
    in force; without them none is. Interrupted, the same command goes on where it was. --out gets
    the losses and looks as rows, last and best weights, finetune.json and a README.md.

    Examples:
      melens finetune smollm2-135m --data train.jsonl --held-out test.jsonl -o runs/lora

      melens finetune smollm2-135m --data train.jsonl --mask-rate 0.5 -o runs/masked --merge runs/m

      melens finetune smollm2-135m --data train.jsonl --method sink --dry-run
    """
    if out is None and not dry_run:
        raise InterventionError("--out FOLDER is missing; it gets the weights and what was seen.")
    require_train()
    how = _how(training, edit, run)
    if out is not None:
        from melens.finetuning.keeping import refuse_folder

        refuse_folder(out)
    if not dry_run:
        _refuse_merge(merge, out, training)
    if opt.has_edit(model):
        output.note(f"{model} has a melens.json; its edit is not applied here, name one.")
    from melens.finetuning.data import read_training_data

    for path in filter(None, (data, held_out)):
        read_training_data(path)
    found = _located(located)
    if dry_run or out is None:
        _show_plan(model, data, how, held_out=held_out, me_layer=found, as_json=as_json)
        return
    _train(model, data, how, out, held_out=held_out, me_layer=found, merge=merge, as_json=as_json)


def _how(training: TrainingOptions, edit: opt.EditOptions, run: TrainRun) -> Training:
    """The settings, as they were typed."""
    from melens.finetuning.settings import Training
    from melens.store import TEXT, read_text

    typed = {field.name: getattr(training, field.name) for field in fields(training)}
    settings: Options = {name: _plain(value) for name, value in typed.items()}
    if training.chat_template is not None:
        settings["chat_template"] = read_text(training.chat_template, TEXT, error=PromptError)
    return Training(
        **settings
        | {
            "report_to": tuple(training.report_to or ()),
            "mask": _mask(edit),
            "batch_size": run.batch_size,
            "seed": run.seed,
            "device": None if run.device == "auto" else run.device,
        }
    )


def _refuse_merge(merge: Path | None, out: Path | None, training: TrainingOptions) -> None:
    """Before the training: a folder that cannot be written, or weights that nothing can hold."""
    if merge is None:
        return
    if training.method is MethodKind.sink:
        raise InterventionError("--merge is for weights, and a learned sink is in none.")
    if out is not None and merge.resolve().is_relative_to(out.resolve()):
        raise InterventionError("--merge and --out must be two folders, neither in the other.")
    from melens.exporting.folder import check_out

    check_out(merge)


def require_train() -> None:
    """Refuse to begin where the extra is missing.

    Raises:  ModelError: saying how to get it.
    """
    from importlib.util import find_spec

    missing = [name for name in ("trl", "peft", "accelerate", "datasets") if not find_spec(name)]
    if missing:
        raise ModelError(f"fine-tuning needs {', '.join(missing)}: pip install 'melens[train]'.")


def _plain(value: object) -> object:
    return value.value if isinstance(value, StrEnum) else value


def _mask(edit: opt.EditOptions) -> Edit:
    """The mask that was typed, or none."""
    from melens.results.edit import Edit

    typed = any(getattr(edit, f"mask_{name}") is not None for name in opt.SETTINGS)
    return opt.edit_of(edit) if typed or edit.edit_file is not None else Edit(name="none")


def _located(path: Path | None) -> MELayer | None:
    if path is None:
        return None
    from melens.results import load_result
    from melens.results.reading import measured_or_none, predicted

    result = load_result(path)
    if (found := measured_or_none(result, str(path))) is None:
        output.note(f"{path} {predicted(result)}; it is located where it is needed.")
    return found


def _show_plan(
    model: str,
    data: Path,
    how: Training,
    *,
    held_out: Path | None,
    me_layer: MELayer | None,
    as_json: bool,
) -> None:
    from dataclasses import asdict

    from melens.finetuning.planning import plan

    found = plan(model, data, how, held_out=held_out, me_layer=me_layer)
    if as_json:
        say_json(asdict(found))
        return
    show_listings([Listing("What this training would take:", found.rows())])


def _train(
    model: str,
    data: Path,
    how: Training,
    out: Path,
    *,
    held_out: Path | None,
    me_layer: MELayer | None,
    merge: Path | None,
    as_json: bool,
) -> None:
    from melens.finetuning.merging import merge as write_merged
    from melens.finetuning.run import finetune as train

    with progress_on("steps", what="training") as tick:
        result = train(
            model, data, how, out=out, held_out=held_out, me_layer=me_layer, progress=tick
        )
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one writes and prints
        return
    output.save(result, out, "finetune", "finetune")
    if merge is not None:
        remark(f"wrote {write_merged(out, merge)}")
    output.show(result, as_json=as_json, folder=out)
