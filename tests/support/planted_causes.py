"""Planted emergence whose cause is known: the norm's gain, one neuron, or both.

Everything else about the models is as in ``planted``: one layer writes one coordinate of BOS.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from planted import Truth, plant
from transformers import PreTrainedModel

CAUSES = ("norm", "neuron", "both")
GAIN = 25.0  # of the marker's coordinate, where the norm is the cause
SPREAD = 24  # neurons that share the write, where no single one is the cause


@dataclass(frozen=True)
class PlantedCause:
    """A Llama with its truth; ``neurons`` are those that write the massive coordinate."""

    cause: str
    model: PreTrainedModel
    truth: Truth
    neurons: tuple[int, ...]
    marker: int


def plant_cause(cause: str, seed: int) -> PlantedCause:
    """Builds a model whose massive activation comes of ``cause``."""
    planted = plant("llama", "single", seed)
    model, truth = planted.model, planted.truth
    assert truth.me_layer is not None
    block = model.model.layers[truth.me_layer]
    gate, up, down = (getattr(block.mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
    neuron = int(down[truth.dim].abs().argmax())
    marker = int(gate[neuron].abs().argmax())
    neurons = [neuron]
    with torch.no_grad():
        if cause in ("norm", "both"):
            # The gain does what the neuron's reading weights did: the write stays the same.
            block.post_attention_layernorm.weight[marker] *= GAIN
            gate[:, marker] /= GAIN
            up[:, marker] /= GAIN
        if cause == "norm":
            others = [n for n in range(len(gate)) if n != neuron][: SPREAD - 1]
            neurons += others
            for other in others:
                gate[other], up[other] = gate[neuron], up[neuron]
                down[:, other] = 0
            down[truth.dim, neurons] = down[truth.dim, neuron] / SPREAD
    return PlantedCause(cause, model, truth, tuple(neurons), marker)
