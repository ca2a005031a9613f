"""Long-context training with fast weights under a two-way context (FocuSFT, arXiv 2605.09932).

Before every outer step LoRA weights in the FFNs of the upper layers are drawn again, take two steps
of gradient descent on the batch, and stay as they are while the outer loss is taken: the outer
weights learn beside them, and without them the model is used. In both loops the tokens of a context
see each other both ways, those of an answer only what is before them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from peft import LoraConfig, LoraModel, PeftModel
from torch import Tensor, nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.trainer.sft_trainer import SFTTrainer

from melens.errors import ModelError
from melens.finetuning.data import IGNORED
from melens.models.decoder import decoder_of

FAST = "fast"
INNER_STEPS, INNER_RATE, INNER_CLIP = 2, 1.0, 1.0
RANK, ALPHA, SHARE = 32, 64, 0.35
"""As published: rank, LoRA alpha, and the share of layers, counted from the top."""
STEPS_APART = 2**15
"""Seeds of two runs, and of two steps, have room for so many between them."""


def add_fast_weights(model: PeftModel) -> None:
    """Put the fast adapter beside the one that is trained; the optimiser never sees it.

    Raises:  ModelError: a model whose layers have a window, or without linear layers in its FFNs.
    """
    text = model.config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    slides = bool(getattr(text, "sliding_window", None)) if kinds is None else None
    if slides or "sliding_attention" in (kinds or ()):
        raise ModelError(
            f"{type(model.get_base_model()).__name__} has layers with a sliding window, and a "
            "context that sees itself both ways has none; train it without --remedy."
        )
    decoder = decoder_of(model)
    first = int(decoder.n_layers * (1 - SHARE))
    inside = {
        id(part)
        for layer, ffn in decoder.ffns.items()
        if layer >= first
        for part in ffn.modules()
        if isinstance(getattr(part, "base_layer", part), nn.Linear)
    }
    base = model.get_base_model()
    names = [name for name, part in base.named_modules() if id(part) in inside]
    names = [name for name in names if name.rpartition(".")[0] not in names and "lora_" not in name]
    if not names:
        raise ModelError(f"no linear layers were found in the FFNs of {decoder.name}.")
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, task_type="CAUSAL_LM")
    model.add_adapter(FAST, config)
    activate(model)


def activate(model: PeftModel) -> None:
    """Both adapters in force, the fast one out of the optimiser's sight."""
    tuner = model.base_model
    assert isinstance(tuner, LoraModel)
    tuner.set_adapter(["default", FAST])
    for value in fast_weights(model):
        value.requires_grad_(False)


def fast_weights(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every fast layer."""
    return [value for name, value in model.named_parameters() if f".{FAST}." in name]


class ThrowAway(TrainerCallback):
    """After every step the fast weights change nothing, so that looks see what will be used."""

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **kwargs: object,
    ) -> None:
        """B is zero again."""
        redraw(model)


class FocusTrainer(SFTTrainer):
    """SFT whose every batch first adapts the fast weights; evaluation is without them."""

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Loading leaves the first adapter alone active."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        activate(self.accelerator.unwrap_model(self.model))

    _batches = (-1, 0)
    """The step that is running, and its batches so far."""

    def _seed(self) -> int:
        """Another one for every batch of every step."""
        step, batches = self._batches
        at = self.state.global_step
        self._batches = (at, batches + 1 if at == step else 0)
        return (self.args.seed * STEPS_APART + at) * STEPS_APART + self._batches[1]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, object]:
        """The outer loss beside fast weights that were adapted to this batch."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        plain = self.accelerator.unwrap_model(model)
        inputs = {**inputs, "attention_mask": two_way(inputs, plain.dtype)}
        adapt(plain, inputs, seed=self._seed())
        # Past TRL's own, which counts tokens in a mask of one row a text.
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


def adapt(model: nn.Module, inputs: dict[str, Tensor], *, seed: int = 0) -> list[float]:
    """Draw the fast weights again and let them follow the loss of one batch; first order.

    Returns: the loss before each step, nats a token.
    """
    fast = fast_weights(model)
    redraw(model, seed)
    losses = []
    with only(model, fast):
        for _ in range(INNER_STEPS):
            loss = model(**inputs, use_cache=False).loss
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                continue
            for value, slope in zip(fast, torch.autograd.grad(loss, fast), strict=True):
                size = float(slope.norm())
                step = slope * min(1.0, INNER_CLIP / (size + 1e-12))
                value.data.sub_(INNER_RATE * step)
    return losses


def redraw(model: nn.Module, seed: int = 0) -> None:
    """A as PEFT draws it, B zero: the fast weights change nothing.

    Drawn by a seed of its own: evaluations and resumed runs move the common random numbers.
    """
    rng: torch.Generator | None = None
    for name, value in model.named_parameters():
        if f".{FAST}." in name:
            rng = rng or torch.Generator(value.device).manual_seed(seed)
            if "lora_A" in name:
                nn.init.kaiming_uniform_(value.data, a=math.sqrt(5), generator=rng)
            else:
                nn.init.zeros_(value.data)


@contextmanager
def only(model: nn.Module, wanted: list[nn.Parameter]) -> Iterator[None]:
    """Let gradients reach these parameters alone while this is open."""
    before = [(value, value.requires_grad) for value in model.parameters()]
    for value, _ in before:
        value.requires_grad_(False)
    for value in wanted:
        value.requires_grad_(True)
    try:
        yield
    finally:
        for value, was in before:
            value.requires_grad_(was)


def two_way(inputs: dict[str, Tensor], dtype: torch.dtype) -> Float[Tensor, "batch 1 query key"]:
    """An additive mask: runs of prompt tokens see each other both ways, answers what is before.

    A later run sees every earlier one; padding is seen by none.
    """
    answers = inputs["labels"] != IGNORED
    real = inputs["attention_mask"].bool()
    seen = _seen(answers) & real[:, None, :]
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(
        ~seen, torch.finfo(dtype).min
    )[:, None]


def _seen(answers: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch query key"]:
    """Which key each query sees, padding left aside."""
    turn = (answers[:, 1:] != answers[:, :-1]).cumsum(dim=1)
    turn = nn.functional.pad(turn, (1, 0))
    query, key = turn[:, :, None], turn[:, None, :]
    causal = torch.ones(turn.shape[1], turn.shape[1], dtype=torch.bool, device=turn.device).tril()
    return (key < query) | ((key == query) & (causal | ~answers[:, :, None]))
