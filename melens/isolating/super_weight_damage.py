"""What removing single weights costs: paired next-token losses, batch by batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from melens.capture import evaluating
from melens.inputs import Inputs
from melens.intervals import mean_interval
from melens.interventions import ffn_ablate_neurons, ffn_zero_weights
from melens.isolating.super_weight_spikes import Place
from melens.metrics import sequence_loss

At = tuple[int, int, int]
"""(layer, row, column) of a down projection."""
CONTROL_POOL = 32
"""A control is drawn from this many entries of the nearest size: few enough to stay near it."""
Tick = Callable[[int], None]


@dataclass(frozen=True)
class Damage:
    """Mean loss under one edit, and its paired difference to the unedited run."""

    without: float
    delta: float
    interval: tuple[float, float] | None


@contextmanager
def removed(model: Any, weights: Sequence[At]) -> Iterator[None]:
    """All these weights at zero, at every token; the model's own weights stay as they are."""
    by_layer: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for layer, row, column in weights:
        by_layer[layer].append((row, column))
    with ExitStack() as stack:
        for layer, pairs in by_layer.items():
            stack.enter_context(ffn_zero_weights(model, layer, weights=pairs, tokens="all"))
        yield


@torch.no_grad()
def losses(inputs: Inputs, tick: Tick) -> Float[Tensor, " sequence"]:
    """Every sequence's mean next-token loss (nats a token, float64); one batch's logits at once."""
    model, found = inputs.model, []
    device = next(model.parameters()).device
    for batch in inputs.batches:
        here = batch.to(device)
        options: dict[str, Any] = {"attention_mask": here.mask.long()} if here.padded else {}
        if hasattr(model, "original_model"):
            options["use_cache"] = False
        with evaluating(model):
            logits = model(here.ids, return_type="logits", **options)
        found.append(sequence_loss(logits, here.ids, here.mask).double().cpu())
        tick(len(batch))
    return torch.cat(found)


class Damages:
    """Runs over the same texts with weights removed, each held against the unedited run."""

    def __init__(self, inputs: Inputs, *, seed: int, tick: Tick) -> None:
        self.inputs, self.seed, self.tick = inputs, seed, tick
        self.clean = losses(inputs, tick)

    @property
    def base(self) -> float:
        """Mean loss with nothing removed."""
        return float(self.clean.mean())

    def of(self, weights: Sequence[At]) -> Damage:
        """Of removing these weights together."""
        return self._under(removed(self.inputs.model, weights))

    def of_neuron(self, layer: int, neuron: int) -> Damage:
        """Of removing a whole neuron: its whole column of the down projection, at every token."""
        return self._under(
            ffn_ablate_neurons(self.inputs.model, layer, neurons=[neuron], tokens="all")
        )

    def _under(self, edit: AbstractContextManager[None]) -> Damage:
        with edit:
            changed = losses(self.inputs, self.tick)
        apart = changed - self.clean
        return Damage(
            float(changed.mean()), float(apart.mean()), mean_interval(apart, seed=self.seed)
        )


def stand_ins(places: Mapping[int, Place], weights: Sequence[At], *, seed: int) -> list[At]:
    """For every weight another of the same matrix: the nearest |value|, no shared row or column.

    One of the CONTROL_POOL nearest, drawn at random.
    """
    rng = torch.Generator().manual_seed(seed)
    made: list[At] = []
    for layer, row, column in weights:
        size = places[layer].ffn.down.float().abs().cpu()
        apart = (size - size[column, row]).abs()
        for other, r, c in weights:
            if other == layer:
                apart[c], apart[:, r] = torch.inf, torch.inf
        for other, r, c in made:
            if other == layer:
                apart[c, r] = torch.inf
        free = int(apart.isfinite().sum())
        nearest = apart.flatten().topk(max(1, min(CONTROL_POOL, free)), largest=False).indices
        pick = int(nearest[int(torch.randint(len(nearest), (), generator=rng))])
        made.append((layer, pick % size.shape[1], pick // size.shape[1]))
    return made


def value_of(places: Mapping[int, Place], at: At) -> float:
    """The entry itself."""
    layer, row, column = at
    return float(places[layer].ffn.down[column, row])
