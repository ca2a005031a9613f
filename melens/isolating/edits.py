"""The edits that isolation makes, each bound to its layer and settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from melens.errors import InterventionError
from melens.formatting import brief
from melens.interventions import (
    ffn_ablate_neurons,
    ffn_cap,
    ffn_pull_back,
    norm_flatten,
    norm_ones,
    norm_shuffle,
    write_block,
)
from melens.isolating.changes import LayerEdit

FFN_EDITS = ("neurons", "pull-back", "cap", "drop")
"""Ablate the neurons that make most of the write; F1; F3; no FFN write at all."""
CAP = 2.0


@dataclass(frozen=True)
class Sizes:
    """Ordinary tokens at one layer: what pull-back and cap are measured against."""

    product_rms: float
    write_norm: float


def flatten(layer: int, norm: str, alpha: float = 0.0) -> LayerEdit:
    """The norm's gain pulled to its mean."""
    return LayerEdit(
        f"flatten {norm} {alpha:g} at {layer}",
        lambda model, tokens: norm_flatten(model, layer, tokens=tokens, norm=norm, alpha=alpha),
    )


def shuffle(layer: int, norm: str, seed: int) -> LayerEdit:
    """The norm's gain in another order."""
    return LayerEdit(
        f"shuffle {norm} {seed} at {layer}",
        lambda model, tokens: norm_shuffle(model, layer, tokens=tokens, norm=norm, seed=seed),
    )


def all_ones(layer: int, norm: str) -> LayerEdit:
    """Every gain 1: the norm's shape and its overall scale are gone."""
    return LayerEdit(
        f"ones {norm} at {layer}",
        lambda model, tokens: norm_ones(model, layer, tokens=tokens, norm=norm),
    )


def ablate(layer: int, neurons: Sequence[int]) -> LayerEdit:
    """Neurons out."""
    return LayerEdit(
        f"ablate {sorted(neurons)} at {layer}",
        lambda model, tokens: ffn_ablate_neurons(model, layer, tokens=tokens, neurons=neurons),
    )


def drop(layer: int, part: str) -> LayerEdit:
    """A block's attention or FFN writes nothing."""
    return LayerEdit(
        f"drop {part} at {layer}",
        lambda model, tokens: write_block(model, layer, tokens=tokens, part=part),
    )


def pull_back(layer: int, reference: float) -> LayerEdit:
    """The product at an ordinary size."""
    return LayerEdit(
        f"pull-back at {layer}",
        lambda model, tokens: ffn_pull_back(model, layer, tokens=tokens, reference=reference),
    )


def cap(layer: int, reference: float) -> LayerEdit:
    """What is written at most twice the ordinary."""
    return LayerEdit(
        f"cap at {layer}",
        lambda model, tokens: ffn_cap(model, layer, tokens=tokens, reference=reference, factor=CAP),
    )


def ffn_edit(kind: str, layer: int, neurons: Sequence[int], sizes: Sizes | None) -> LayerEdit:
    """The chosen FFN edit at one layer."""
    if kind == "neurons":
        return ablate(layer, neurons)
    if kind == "drop":
        return drop(layer, "ffn")
    assert sizes is not None
    if kind == "pull-back":
        return pull_back(layer, sizes.product_rms)
    return cap(layer, sizes.write_norm)


def named(kind: str, neurons: Sequence[int]) -> str:
    """How a sentence says it."""
    if kind == "neurons":
        which = ", ".join(map(str, neurons[:4])) + (", ..." if len(neurons) > 4 else "")
        return f"{'neuron' if len(neurons) == 1 else f'{len(neurons)} neurons'} {which} ablated"
    return {"pull-back": "its FFN product pulled back", "cap": f"its FFN write capped at {CAP:g} x",
            "drop": "its FFN write dropped"}[kind]  # fmt: skip


def check_ffn_edit(kind: Any) -> None:
    """Refuse an unknown kind of FFN edit."""
    if kind not in FFN_EDITS:
        raise InterventionError(
            f"ffn_edit must be one of {', '.join(FFN_EDITS)}, got {brief(kind, 40)}."
        )
