"""FineTuning: how a training ran, and what became of the ME Layer. Layers count from 0."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from melens.protocols import JsonObject
from melens.provenance import RunInfo
from melens.results.base import Part, Result
from melens.results.edit import Edit

MaskedIn = Literal["off", "training", "inference", "both"]
WHERE: dict[MaskedIn, str] = {
    "off": "off",
    "training": "in training only",
    "inference": "at inference only",
    "both": "in training and at inference",
}


class EmergenceRow(Part):
    """One look at the model between two steps of training. Layers count from 0."""

    step: int
    verdict: str
    me_layer: int | None
    peak_layer: int | None
    dims: tuple[int, ...]
    """Massive dimensions, the largest first."""
    coordinate: float | None
    """Largest massive coordinate, signed; residual units."""
    norm: float | None
    """Of the primary massive token at the layer of its peak, in that layer's median norms."""
    largest: float | None
    """Largest |x| of any token and layer: an overflow watch (float16 ends at 65,504); None where
    some are not finite."""
    sink_rate: float | None
    """Share of heads that sink at the first token, mean over layers (epsilon 0.3)."""
    key_rank: float | None
    """Effective rank of keys, mean over the layers after the ME Layer, massive token included."""
    by_layer: tuple[float, ...]
    """Largest |x| of each block output."""
    seconds: float
    """What this look took."""


class LossRow(Part):
    """What the trainer logged at one step."""

    step: int
    loss: float | None
    """Of the step's batches, nats a trained token; of dpo and grpo the objective's own."""
    held_out: float | None
    """The same on the held-out rows, where they were run at this step; None of grpo, whose loss
    says nothing of how good the answers are."""
    reward: float | None = None
    """Mean over the answers of the step; of grpo."""
    held_out_reward: float | None = None


class FineTuning(Result):
    """A finished training: its settings, losses and looks at the ME Layer."""

    schema_id: ClassVar[str] = "melens/finetune/1"

    kind: Literal["finetune"] = "finetune"
    schema_: Literal["melens/finetune/1"] = Field(default="melens/finetune/1", alias="schema")
    objective: Literal["sft", "dpo", "grpo"]
    method: Literal["lora", "full", "sink"]
    at: Literal["all", "me-layer"]
    mask: Edit
    masked_in: MaskedIn
    remedy: Literal["none", "focus"] = "none"
    """focus: fast weights under a two-way context (FocuSFT)."""
    me_layer: int | None
    """Located before the training; None where none was needed, or there is none."""
    steps: int
    trained: int
    """Numbers that were trained."""
    of: int
    """Numbers in the model."""
    texts: int
    """Rows of the training data, those that are too long left out."""
    tokens: int
    """In them, prompts included."""
    too_long: int
    held_out: int
    """Rows; 0 = none were given."""
    data: str
    """SHA-256 of the file."""
    edited_tokens: int
    """By the mask, in all passes of the training; of several processes those of the first."""
    losses: tuple[LossRow, ...]
    looks: tuple[EmergenceRow, ...]
    best_step: int | None
    """With the least held-out loss."""
    run: RunInfo

    @model_validator(mode="after")
    def _fits_together(self) -> FineTuning:
        """Refuse what no training can have left."""
        for name, rows in (("losses", self.losses), ("looks", self.looks)):
            steps = [row.step for row in rows]
            if steps != sorted(steps) or any(not 0 <= step <= self.steps for step in steps):
                raise ValueError(f"{name} must be in the order of their steps, from 0 to steps")
        if not self.trained > 0:
            raise ValueError("nothing was trained")
        return self

    @property
    def best(self) -> LossRow | None:
        """Where the held-out loss was least, or of grpo the reward largest."""
        known = [row for row in self.losses if row.held_out is not None]
        rewarded = [row for row in self.losses if row.held_out_reward is not None]
        if rewarded:
            return max(rewarded, key=lambda row: row.held_out_reward or 0.0)
        return min(known, key=lambda row: row.held_out or 0.0) if known else None

    def rows(self) -> list[JsonObject]:
        """One row a step that was logged."""
        return [row.model_dump() for row in self.losses]

    def summary(self) -> str:
        """One plain sentence; layers count from 0 at the block output."""
        where = f" at the ME Layer ({self.me_layer})" if self.at == "me-layer" else ""
        if self.mask.name == "none":
            mask = "without a mask"
        elif self.method == "sink":
            under = self.masked_in in ("training", "both")
            mask = f"started under {self.mask.label}" if under else "started without a mask"
        else:
            mask = f"{self.mask.label} {WHERE[self.masked_in]}"
        mask += ", with fast weights (FocuSFT)" * (self.remedy == "focus")
        said = (
            f"{self.run.model}, {self.steps} steps of {self.objective} ({self.method}{where}, "
            f"{self.trained:,} of {self.of:,} numbers), {mask}"
        )
        return f"{said}{self._learned()}{self._emergence()}."

    def _learned(self) -> str:
        """First and last of what was to fall or to rise, and the best on held-out rows."""
        grpo = self.objective == "grpo"
        found = [row.reward if grpo else row.loss for row in self.losses]
        known = [value for value in found if value is not None]
        what = "mean reward" if grpo else "loss"
        beside = " beside weights adapted to each batch" * (self.remedy == "focus")
        said = f": {what} {known[0]:.3f} at first, {known[-1]:.3f} at last{beside}" if known else ""
        if grpo and known and not any(known):
            said += " (no answer was ever rewarded, so nothing was learned)"
        if self.best is not None:
            value = self.best.held_out_reward if grpo else self.best.held_out
            said += f", {value:.3f} on held-out rows at best (step {self.best.step})"
        return said

    def _emergence(self) -> str:
        if not self.looks:
            return ""
        first, last = self.looks[0], self.looks[-1]
        if first.coordinate is None or last.coordinate is None:
            return f"; massive activations: {first.verdict} before, {last.verdict} after"
        moved = (
            f"stays {_where(last)}"
            if first.me_layer == last.me_layer
            else f"moves from {_where(first)} to {_where(last)}"
        )
        return (
            f"; the ME Layer {moved} (counted from 0, at the block output), its coordinate goes "
            f"from {first.coordinate:,.0f} to {last.coordinate:,.0f}"
        )


def _where(row: EmergenceRow) -> str:
    return "none" if row.me_layer is None else str(row.me_layer)
