"""What a training run leaves: losses as rows, checkpoints that resume, adapters in safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from melens.errors import ResultError
from melens.interventions.core import EditedTokens
from melens.protocols import JsonObject, Tokenizer
from melens.results.finetune import EmergenceRow, LossRow
from melens.settings import Progress
from melens.store import (
    RESULT,
    json_object,
    lines_of,
    read_text,
    try_writing,
    write_atomically,
    write_folder,
)

if TYPE_CHECKING:
    from melens.finetuning.adapters import TrainedModel

SETTINGS, LOSSES, LOOKS, CHECKPOINTS = (
    "training.json",
    "losses.jsonl",
    "emergence.jsonl",
    "checkpoints",
)
LAST, BEST, SINK = "last", "best", "prefix"
RESULT_FILE = "finetune.json"
KEYED, SOURCE, LOCATED_ON = "training", "source", "located_on"
"""In the settings: what a resumed training must share; what the base model is loaded by; ids that
the ME Layer was located on."""
EDITED = "edited_tokens"
INFINITE = float("inf")
STATE = "trainer_state.json"
"""What transformers writes last into a checkpoint: one without it was cut short."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")


def refuse_folder(folder: Path) -> None:
    """Refuse what no training can be kept in, before any weights are loaded.

    Raises:  ResultError: a file, or a folder that holds something else. OutputError: it cannot be
             written.
    """
    if folder.exists() and not folder.is_dir():
        raise ResultError(f"{folder} is a file; name a folder for the training.")
    if not (folder / SETTINGS).exists() and folder.exists() and any(folder.iterdir()):
        raise ResultError(f"{folder} is not empty and holds no training; name another folder.")
    try_writing(folder, "name another folder")


def take_up(folder: Path, facts: JsonObject, key: str, *, steps: int) -> Path | None:
    """The newest whole checkpoint of the same training; begins the folder where there is none.

    Rows of losses and looks are cut to that step. A checkpoint of the last step itself is left
    out: nothing would be left to train, and its weights are not what a trainer would end with.

    Raises:  ResultError: the folder is of another training.
    """
    if not (folder / SETTINGS).exists():
        refuse_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"key": key, **facts}, indent=1, default=str)
        write_atomically(folder / SETTINGS, text + "\n")
    elif read_settings(folder).get("key") != key:
        raise ResultError(
            f"{folder} holds another training (other model, data, settings, number of processes or "
            "version of melens); name another folder, or delete this one."
        )
    if (folder / RESULT_FILE).exists():
        return None
    checkpoint = _newest(folder / CHECKPOINTS, steps)
    done = 0 if checkpoint is None else int(checkpoint.name.split("-")[1])
    for name in (LOSSES, LOOKS):
        cut_rows(folder / name, done)
    return checkpoint


@contextmanager
def begun(folder: Path, *, anew: bool) -> Iterator[None]:
    """Take back what was begun where a trainer cannot be made: the right settings begin again."""
    try:
        yield
    except BaseException:
        if anew:
            (folder / SETTINGS).unlink(missing_ok=True)
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        raise


def read_settings(folder: Path) -> JsonObject:
    """What a training was begun with.

    Raises:  ResultError: no such file.
    """
    return json_object(read_text(folder / SETTINGS, RESULT, error=ResultError)) or {}


def _newest(folder: Path, steps: int) -> Path | None:
    """Checkpoints that a kill cut short are removed, and one with nothing left to train."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in reversed(found):
        if _is_whole(path) and int(path.name.split("-")[1]) < steps:
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
    """Rows up to a step; what a killed run wrote after its last checkpoint comes again."""
    if path.exists():
        kept = [row for row in read_rows(path) if row["step"] <= step]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))


def read_rows(path: Path) -> list[JsonObject]:
    """Whole rows of a file that may not exist yet; the line that a kill cut is left out."""
    if not path.exists():
        return []
    rows = map(json_object, lines_of(read_text(path, RESULT, error=ResultError)))
    return [row for row in rows if row is not None and isinstance(row.get("step"), int)]


def append_row(path: Path, row: JsonObject) -> None:
    """One more line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def losses_in(folder: Path) -> tuple[LossRow, ...]:
    """One row a step that was logged, training and held-out loss side by side."""
    found: dict[int, JsonObject] = {}
    for row in read_rows(folder / LOSSES):
        found.setdefault(row["step"], {}).update(row)
    return tuple(
        LossRow(
            step=step,
            loss=row.get("loss"),
            held_out=None if "eval_reward" in row else row.get("eval_loss"),
            reward=row.get("reward"),
            held_out_reward=row.get("eval_reward"),
        )
        for step, row in sorted(found.items())
        if "loss" in row or "eval_loss" in row
    )


def edited_in(folder: Path) -> int:
    """Tokens that the mask had edited at the last row, interruptions counted through."""
    rows = read_rows(folder / LOSSES)
    return rows[-1].get(EDITED, 0) if rows else 0


def rank_of(row: LossRow) -> float:
    """Smaller is better: the loss, or of grpo the reward with its sign turned."""
    if row.held_out_reward is not None:
        return -row.held_out_reward
    return INFINITE if row.held_out is None else row.held_out


def looks_in(folder: Path) -> tuple[EmergenceRow, ...]:
    """Every look of the callback."""
    found = {row["step"]: row for row in read_rows(folder / LOOKS)}
    return tuple(
        EmergenceRow.model_validate_json(json.dumps(row), strict=True)
        for _, row in sorted(found.items())
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
        self,
        folder: Path,
        model: TrainedModel,
        tokenizer: Tokenizer,
        progress: Progress | None = None,
    ) -> None:
        self.folder, self.model, self.tokenizer = folder, model, tokenizer
        self.progress = progress
        self.edited: EditedTokens | None = None
        """What the mask counts, once it is in force."""
        self._edited_before = edited_in(folder)
        self.best = min(map(rank_of, losses_in(folder)), default=INFINITE)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
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
        **kwargs: object,
    ) -> None:
        """One row a line."""
        row = {name: value for name, value in (logs or {}).items() if "emergence/" not in name}
        if self.edited is not None:
            row[EDITED] = self._edited_before + self.edited.tokens
        if row and state.is_world_process_zero:
            append_row(self.folder / LOSSES, {"step": state.global_step, **row})

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Keep the weights with the least held-out loss."""
        found = metrics or {}
        # Of grpo the reward counts: its loss says nothing of how good the answers are.
        loss = -found["eval_reward"] if "eval_reward" in found else found.get("eval_loss", INFINITE)
        if loss < self.best and state.is_world_process_zero:
            self.best = loss
            save(self.model, self.folder / BEST, self.tokenizer)


def save(model: TrainedModel, folder: Path, tokenizer: Tokenizer) -> None:
    """The adapter, or the whole model where all of it was trained, in safetensors."""
    from peft import PeftModel

    def fill(part: Path) -> None:
        if isinstance(model, PeftModel):  # fast weights, where there are any, are thrown away
            model.save_pretrained(str(part), selected_adapters=["default"])
        else:
            model.save_pretrained(part)
        (part / "README.md").unlink(missing_ok=True)  # PEFT's, which says nothing yet
        tokenizer.save_pretrained(part)

    write_folder(folder, fill)
