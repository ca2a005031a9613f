"""What a training run leaves: losses as rows, checkpoints that resume, adapters in safetensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from melens.errors import ResultError
from melens.store import write_atomically

SETTINGS, LOSSES, LOOKS, CHECKPOINTS = (
    "training.json",
    "losses.jsonl",
    "emergence.jsonl",
    "checkpoints",
)
LAST, BEST = "last", "best"
STATE = "trainer_state.json"
"""What transformers writes last into a checkpoint: one without it was cut short."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")


def take_up(folder: Path, facts: dict[str, Any], key: str) -> Path | None:
    """The newest whole checkpoint of the same training; begins the folder where there is none.

    Raises:  ResultError: the folder is of another training.
    """
    path = folder / SETTINGS
    if path.exists():
        if json.loads(path.read_text("utf-8")).get("key") != key:
            raise ResultError(
                f"{folder} holds another training (other model, data, settings or version); name "
                "another folder, or start anew (--force)."
            )
        return _newest(folder / CHECKPOINTS)
    if folder.exists() and any(folder.iterdir()):
        raise ResultError(f"{folder} is not empty and holds no training; name another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"key": key, **facts}, indent=1, default=str) + "\n")
    return None


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
    """Rows up to a step; what a killed run wrote behind its last checkpoint comes again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the line that the kill cut
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    write_atomically(path, "".join(kept))


def tidy(folder: Path) -> None:
    """Checkpoints are of no use once the training is done; no pickle is left behind."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    for pattern in PICKLES:
        for path in folder.rglob(pattern):
            path.unlink()


class Keeper(TrainerCallback):
    """Losses as rows, and the best weights so far."""

    def __init__(self, folder: Path, model: Any) -> None:
        self.folder, self.model, self.best = folder, model, float("inf")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """One row a line."""
        row = {"step": state.global_step, **(logs or {})}
        with (self.folder / LOSSES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

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
        if loss < self.best:
            self.best = loss
            save(self.model, self.folder / BEST)


def save(model: Any, folder: Path) -> None:
    """The adapter, or the whole model where all of it was trained, in safetensors."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
