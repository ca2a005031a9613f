"""TRL's trainers, set up for the rows at hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from melens.chat import Message
from melens.errors import ModelError
from melens.finetuning.data import TrainingRow
from melens.finetuning.keeping import CHECKPOINTS
from melens.finetuning.rewards import reward_of
from melens.finetuning.settings import Objective, Training
from melens.finetuning.subject import TrainingSet, TrainingSubject, objective_of
from melens.models.loading import best_device
from melens.protocols import Options

if TYPE_CHECKING:
    from datasets import Dataset

    from melens.finetuning.adapters import TrainedModel

Classes = tuple[type[TrainingArguments], type[Trainer]]


def trainer_of(
    model: TrainedModel,
    subject: TrainingSubject,
    how: Training,
    folder: Path,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    """The trainer of the objective; its loop, optimiser and checkpoints are TRL's own.

    Raises:  ModelError: a model that no hook would be seen in.
    """
    require_uncompiled(model)
    objective = objective_of(subject.rows.data, how)
    kinds, dataset = _KINDS[objective]
    config, trainer = _focus() if how.remedy == "focus" else kinds()
    held_out = subject.held_out
    arguments = _arguments(how, folder, evaluate=held_out is not None) | _OWN[objective](how)
    made = silent(trainer)(
        model=model,
        args=config(**arguments),
        train_dataset=dataset(subject.rows, how),
        eval_dataset=None if held_out is None else dataset(held_out, how),
        processing_class=subject.tokenizer,
        callbacks=list(callbacks),
        **_more(objective, model, how),
    )
    made.remove_callback(PrinterCallback)  # the losses go into the folder, not on stdout
    return made


def silent(trainer: type[Trainer]) -> Callable[..., Trainer]:
    """The trainer, which reports its use to nobody: the switch of the environment is read only when
    the hub's library is imported.
    """  # noqa: D205

    class Silent(trainer):
        def _send_telemetry(self) -> None:
            """TRL's own would ask the network."""

    Silent.__name__ = trainer.__name__
    return Silent


def _more(objective: Objective, model: TrainedModel, how: Training) -> Options:
    """What one objective's trainer alone takes."""
    if objective == "grpo":
        return {"reward_funcs": [reward_of(how.reward)]}
    if objective == "dpo" and how.method == "full":  # an adapter is switched off for it instead
        return {"ref_model": copy.deepcopy(model).requires_grad_(False)}
    return {}


def _arguments(how: Training, folder: Path, *, evaluate: bool) -> Options:
    every = min(how.save_every, how.steps)
    return {
        "output_dir": str(folder / CHECKPOINTS),
        "max_steps": how.steps,
        "per_device_train_batch_size": how.batch_size,
        "per_device_eval_batch_size": how.batch_size,
        "gradient_accumulation_steps": how.accumulate,
        "learning_rate": how.rate,
        "lr_scheduler_type": "linear",
        "gradient_checkpointing": False,  # switched on apart, with the edit's own contexts
        "bf16": how.bf16,
        "use_cpu": how.device == "cpu" or best_device() == "cpu",
        "seed": how.seed,
        "data_seed": how.seed,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 2,
        "eval_strategy": "steps" if evaluate else "no",
        "eval_steps": every,
        "logging_steps": 1,
        "report_to": list(how.report_to),
        "disable_tqdm": True,
    }


def _sft() -> Classes:
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    return SFTConfig, SFTTrainer


def _focus() -> Classes:
    from trl.trainer.sft_config import SFTConfig

    from melens.finetuning.focus import FocusTrainer

    return SFTConfig, FocusTrainer


def _dpo() -> Classes:
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    return DPOConfig, DPOTrainer


def _grpo() -> Classes:
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    return GRPOConfig, GRPOTrainer


def _token_rows(rows: TrainingSet, how: Training) -> Dataset:
    """Ids and labels; of method sink without the token that the trained column stands for."""
    first = int(how.method == "sink")
    return _dataset(
        input_ids=[list(ids[first:]) for ids in rows.tokens.ids],
        labels=[list(labels[first:]) for labels in rows.tokens.labels],
    )


def _pairs(rows: TrainingSet, how: Training) -> Dataset:
    """Conversations where there is a template, else texts; TRL tokenises them as data.py does."""
    chat = rows.tokens.chat

    def answer(text: str | None) -> list[Message] | str | None:
        return [{"role": "assistant", "content": text}] if chat else text

    return _dataset(
        prompt=[_prompt(row, rows) for row in rows.kept],
        chosen=[answer(row.answer) for row in rows.kept],
        rejected=[answer(row.rejected) for row in rows.kept],
    )


def _questions(rows: TrainingSet, how: Training) -> Dataset:
    return _dataset(
        prompt=[_prompt(row, rows) for row in rows.kept],
        answer=[row.answer for row in rows.kept],
    )


def _prompt(row: TrainingRow, rows: TrainingSet) -> list[Message] | str:
    if rows.tokens.chat:
        return list(row.messages)
    asked = row.messages[0]["content"]
    return f"Question: {asked}\nAnswer:" if rows.data.kind == "question" else asked


def _dataset(**columns: Sequence[object]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict(columns)


_KINDS: dict[
    Objective, tuple[Callable[[], Classes], Callable[[TrainingSet, Training], Dataset]]
] = {
    "sft": (_sft, _token_rows),
    "dpo": (_dpo, _pairs),
    "grpo": (_grpo, _questions),
}
_OWN: dict[Objective, Callable[[Training], Options]] = {
    "sft": lambda how: {
        "max_length": how.max_tokens if how.packing else None,
        "packing": how.packing,
    },
    "dpo": lambda how: {"max_length": None},
    "grpo": lambda how: {
        "num_generations": how.generations,
        "max_completion_length": how.max_new_tokens,
    },
}
"""What each trainer takes beside the arguments of all; no text is cut (too long ones are left out
before), so no length is given where none is needed."""


def require_uncompiled(model: nn.Module) -> None:
    """Refuse what no hook would be seen in.

    Raises:  ModelError: the model was compiled.
    """
    if getattr(model, "_compiled_call_impl", None) is not None or hasattr(model, "_orig_mod"):
        raise ModelError(
            "this model was compiled, and the mask lives in hooks that a compiled model does not "
            "run; train it uncompiled."
        )
