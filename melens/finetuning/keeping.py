"""What a training run leaves: losses as rows, checkpoints that resume, adapters in safetensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from melens.errors import ResultError
from melens.protocols import JsonObject
from melens.results.finetune import EmergenceRow, LossRow
from melens.settings import Progress
from melens.store import RESULT, json_object, lines_of, read_text, write_atomically

SETTINGS, LOSSES, LOOKS, CHECKPOINTS = (
    "training.json",
    "losses.jsonl",
    "emergence.jsonl",
    "checkpoints",
)
LAST, BEST, SINK = "last", "best", "prefix"
RESULT_FILE = "finetune.json"
SOURCE, LOCATED_ON = "source", "located_on"
"""In the settings: what the base model is loaded by; ids that the ME Layer was located on."""
STATE = "trainer_state.json"
"""What transformers writes last into a checkpoint: one without it was cut short."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")


def take_up(folder: Path, facts: JsonObject, key: str) -> Path | None:
    """The newest whole checkpoint of the same training; begins the folder where there is none.

    Raises:  ResultError: the folder is of another training, or holds something else.
    """
    if (folder / SETTINGS).exists():
        if read_settings(folder).get("key") != key:
            raise ResultError(
                f"{folder} holds another training (other model, data, settings or version of "
                "melens); name another folder, or delete this one."
            )
        return _newest(folder / CHECKPOINTS)
    if folder.exists() and any(folder.iterdir()):
        raise ResultError(f"{folder} is not empty and holds no training; name another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"key": key, **facts}, indent=1, default=str)
    write_atomically(folder / SETTINGS, text + "\n")
    return None


def read_settings(folder: Path) -> JsonObject:
    """What a training was begun with.

    Raises:  ResultError: no such file.
    """
    return json_object(read_text(folder / SETTINGS, RESULT, error=ResultError)) or {}


def _newest(folder: Path) -> Path | None:
    """Checkpoints that a kill cut short are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in reversed(found):
        if _is_whole(path):
            return path
        shutil.rmtree(path)
    return None


def _is_whole(path: Path) -> bool:
    try:
        json.loads((path / STATE).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return True


def cut_rows(path: Path, step: int) -> None:
    """TrainingSet up to a step; what a killed run wrote behind its last checkpoint comes again."""
    if path.exists():
        kept = [row for row in read_rows(path) if row["step"] <= step]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))


def read_rows(path: Path) -> list[JsonObject]:
    """Whole rows of a file that may not exist yet; the line that a kill cut is left out."""
    if not path.exists():
        return []
    rows = map(json_object, lines_of(read_text(path, RESULT, error=ResultError)))
    return [row for row in rows if row is not None]


def losses_in(folder: Path) -> tuple[LossRow, ...]:
    """One row a step that was logged, training and held-out loss side by side."""
    found: dict[int, JsonObject] = {}
    for row in read_rows(folder / LOSSES):
        found.setdefault(row["step"], {}).update(row)
    return tuple(
        LossRow(step=step, loss=row.get("loss"), held_out=row.get("eval_loss"))
        for step, row in sorted(found.items())
        if "loss" in row or "eval_loss" in row
    )


def looks_in(folder: Path) -> tuple[EmergenceRow, ...]:
    """Every look of the callback."""
    return tuple(
        EmergenceRow.model_validate_json(json.dumps(row), strict=True)
        for row in read_rows(folder / LOOKS)
    )


def tidy(folder: Path) -> None:
    """Checkpoints are of no use once the training is done; no pickle is left behind."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    for pattern in PICKLES:
        for path in folder.rglob(pattern):
            path.unlink()


class KeepLosses(TrainerCallback):
    """Losses as rows, and the best weights so far; in the first of several processes only."""

    def __init__(
        self, folder: Path, model: Any, tokenizer: Any, progress: Progress | None = None
    ) -> None:
        self.folder, self.model, self.tokenizer = folder, model, tokenizer
        self.progress = progress
        known = [row.held_out for row in losses_in(folder) if row.held_out is not None]
        self.best = min(known, default=float("inf"))

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Say how far it is."""
        if self.progress is not None and state.is_world_process_zero:
            self.progress(state.global_step, state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """One row a line."""
        row = {name: value for name, value in (logs or {}).items() if "emergence/" not in name}
        if row and state.is_world_process_zero:
            with (self.folder / LOSSES).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **row}) + "\n")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the weights with the least held-out loss."""
        loss = (metrics or {}).get("eval_loss", float("inf"))
        if loss < self.best and state.is_world_process_zero:
            self.best = loss
            save(self.model, self.folder / BEST, self.tokenizer)


def save(model: Any, folder: Path, tokenizer: Any) -> None:
    """The adapter, or the whole model where all of it was trained, in safetensors."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    adapters = {"selected_adapters": ["default"]} if hasattr(model, "peft_config") else {}
    model.save_pretrained(part, **adapters)  # fast weights, where there are any, are thrown away
    tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
