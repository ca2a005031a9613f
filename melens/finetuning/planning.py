"""What a training would take, before it is begun: counts, and one batch that was timed."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from melens.finetuning.adapters import parameters_of, trainable
from melens.finetuning.data import IGNORED, TokenRows
from melens.finetuning.run import masked
from melens.finetuning.settings import Training, training_of
from melens.finetuning.subject import checked
from melens.protocols import JsonObject
from melens.results import MELayer

ADAM = 2
"""Numbers that the optimiser keeps for each trained one, beside its gradient."""


@dataclass(frozen=True)
class Plan:
    """A training that was not begun."""

    steps: int
    texts: int
    too_long: int
    epochs: float
    """How often each text is seen."""
    tokens: int
    """Of the texts, prompts included."""
    tokens_a_step: float
    """Mean, padding left out."""
    trained: int
    of: int
    optimiser_bytes: int
    """Gradients and the optimiser's state of what is trained."""
    peak_bytes: int
    """Of this process or device, with one batch forward and backward; the optimiser's not in it."""
    seconds: float
    """All steps, from one batch that was timed; looks, evaluation and saving come on top."""

    def rows(self) -> list[JsonObject]:
        """Names and values, for a table."""
        return [
            {"": "steps", "value": f"{self.steps:,} ({self.epochs:.2f} times through the data)"},
            {"": "texts", "value": f"{self.texts:,}; {self.too_long:,} too long and left out"},
            {"": "tokens", "value": f"{self.tokens:,}; {self.tokens_a_step:,.0f} a step"},
            {"": "trained", "value": f"{self.trained:,} of {self.of:,} numbers"},
            {
                "": "memory",
                "value": f"{self.peak_bytes / 1e9:.2f} GB with one batch, and "
                f"{self.optimiser_bytes / 1e9:.2f} GB for the optimiser",
            },
            {"": "time", "value": f"about {self.seconds / 60:,.1f} min"},
        ]


def plan(
    model: str | Path,
    data: Path | str,
    how: Training | None = None,
    *,
    held_out: Path | str | None = None,
    me_layer: MELayer | None = None,
    **settings: Any,
) -> Plan:
    """Steps, tokens, memory and time of :func:`melens.finetune` with the same arguments.

    Nothing is written. The time is that of one batch of the longest texts, which are what memory
    has to hold.

    Raises:  as ``finetune``.
    """
    how = training_of(how, settings)
    subject = checked(model, data, how, held_out=held_out, me_layer=me_layer)
    trained = trainable(subject.hf, how, subject.me_layer, first_token=subject.first_token)
    rows = subject.rows.tokens
    with masked(trained, how, subject.me_layer):
        seconds = _timed(trained, rows, how)
    a_step = how.batch_size * how.accumulate
    count = parameters_of(trained)
    return Plan(
        steps=how.steps,
        texts=len(rows.ids),
        too_long=len(rows.too_long),
        epochs=how.steps * a_step / len(rows.ids),
        tokens=rows.tokens,
        tokens_a_step=a_step * rows.tokens / len(rows.ids),
        trained=count,
        of=subject.numbers,
        optimiser_bytes=4 * (1 + ADAM) * count,
        peak_bytes=_peak(next(subject.hf.parameters()).device),
        seconds=seconds * how.steps * how.accumulate,
    )


def _timed(model: Any, rows: TokenRows, how: Training) -> float:
    """Forward and backward of the longest texts, once for the caches and once for the clock."""
    order = sorted(range(len(rows.ids)), key=lambda n: -len(rows.ids[n]))[: how.batch_size]
    width, device = len(rows.ids[order[0]]), next(model.parameters()).device
    ids = torch.zeros(len(order), width, dtype=torch.long)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for at, n in enumerate(order):
        length = len(rows.ids[n])
        ids[at, :length] = torch.tensor(rows.ids[n])
        labels[at, :length] = torch.tensor(rows.labels[n])
        mask[at, :length] = 1
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    batch = {name: value.to(device) for name, value in batch.items()}
    model.train()
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=how.bf16):
            loss = model(**batch).loss
        float(loss.backward() or loss.detach())  # the value: until then a device may lag behind
        seconds = time.perf_counter() - started
        model.zero_grad()
    return seconds


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
