"""TRL's trainers, set up for the rows at hand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from melens.errors import ModelError
from melens.finetuning.data import TokenRows
from melens.finetuning.keeping import CHECKPOINTS
from melens.finetuning.settings import Training


def sft_trainer(
    model: Any,
    tokenizer: Any,
    rows: TokenRows,
    held_out: TokenRows | None,
    how: Training,
    folder: Path,
    callbacks: list[Any],
) -> Any:
    """Supervised fine-tuning on rows that are token ids already; prompts have no label."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports its use otherwise
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(**_arguments(how, folder, evaluate=held_out is not None))
    return SFTTrainer(
        model=model,
        args=args,
        train_dataset=_dataset(rows),
        eval_dataset=None if held_out is None else _dataset(held_out),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def _arguments(how: Training, folder: Path, *, evaluate: bool) -> dict[str, Any]:
    every = min(how.save_every, how.steps)
    return {
        "output_dir": str(folder / CHECKPOINTS),
        "max_steps": how.steps,
        "per_device_train_batch_size": how.batch_size,
        "per_device_eval_batch_size": how.batch_size,
        "gradient_accumulation_steps": how.accumulate,
        "learning_rate": how.rate,
        "lr_scheduler_type": "linear",
        "max_length": how.max_tokens,
        "packing": how.packing,
        "gradient_checkpointing": False,  # switched on apart, with the edit's own contexts
        "bf16": how.bf16,
        "seed": how.seed,
        "data_seed": how.seed,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 2,
        "eval_strategy": "steps" if evaluate else "no",
        "eval_steps": every,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
    }


def _dataset(rows: TokenRows) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(
        {"input_ids": list(map(list, rows.ids)), "labels": list(map(list, rows.labels))}
    )


def require_uncompiled(model: Any) -> None:
    """Refuse what no hook would be seen in.

    Raises:  ModelError: the model was compiled.
    """
    if getattr(model, "_compiled_call_impl", None) is not None or hasattr(model, "_orig_mod"):
        raise ModelError(
            "this model was compiled, and the mask lives in hooks that a compiled model does not "
            "run; train it uncompiled (torch_compile=False)."
        )
