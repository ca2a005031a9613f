"""What a training would take, before it is begun: counts, and one batch that was timed."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from melens.finetuning.adapters import parameters_of
from melens.finetuning.data import IGNORED, TokenRows
from melens.finetuning.run import masked, ready
from melens.finetuning.settings import Training, training_of
from melens.finetuning.subject import checked, objective_of
from melens.models.contract import failing
from melens.protocols import JsonObject
from melens.results.reading import HoldsMELayer

if TYPE_CHECKING:
    from melens.finetuning.adapters import TrainedModel

DPO_PASSES = 2.7
"""Times one answer with its gradients: of a pair two such, and two of the reference without."""
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
    seconds: float | None
    """All steps, from one batch that was timed; looks, evaluation and saving come on top. None of
    grpo, which first draws its answers."""

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
            {"": "time", "value": "-" if self.seconds is None else _minutes(self.seconds)},
        ]


def plan(
    model: str | Path,
    data: Path | str,
    how: Training | None = None,
    *,
    held_out: Path | str | None = None,
    me_layer: HoldsMELayer | None = None,
    **settings: object,
) -> Plan:
    """Steps, tokens, memory and time of :func:`melens.finetune` with the same arguments.

    Nothing is written. The time is that of one batch of the longest texts, which are what memory
    has to hold.

    Raises:  as ``finetune``.
    """
    how = training_of(how, settings)
    subject = checked(model, data, how, held_out=held_out, me_layer=me_layer)
    trained, _ = ready(subject, how)
    rows, objective = subject.rows.tokens, objective_of(subject.rows.data, how)
    with masked(trained, how, subject.me_layer):
        seconds = _timed(trained, rows, how)
    seconds *= DPO_PASSES if objective == "dpo" else 1
    mean = rows.tokens / len(rows.ids)
    a_step = how.batch_size * how.accumulate * (how.max_tokens / mean if how.packing else 1)
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
        seconds=None if objective == "grpo" else seconds * how.steps * how.accumulate,
    )


def _timed(model: TrainedModel, rows: TokenRows, how: Training) -> float:
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
    first = int(how.method == "sink")  # whose first token is no input
    batch = {name: value[:, first:].to(device) for name, value in batch.items()}
    model.train()
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        if how.remedy == "focus":
            _adapt_to(model, batch)
        with (
            failing(f"{type(model).__name__} cannot take one training step"),
            torch.autocast(device.type, torch.bfloat16, enabled=how.bf16),
        ):
            loss = model(**batch).loss
        float(loss.backward() or loss.detach())  # the value: until then a device may lag behind
        seconds = time.perf_counter() - started
        model.zero_grad()
    return seconds


def _adapt_to(model: TrainedModel, batch: dict[str, Tensor]) -> None:
    """What the remedy does before a step."""
    from melens.finetuning.focus import adapt, two_way

    adapt(model, batch | {"attention_mask": two_way(batch, model.dtype)})


def _minutes(seconds: float) -> str:
    return f"about {seconds / 60:,.1f} min"


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
