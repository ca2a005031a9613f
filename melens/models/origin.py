"""Where a loaded model came from, kept beside it and never inside it."""

from __future__ import annotations

import hashlib
import weakref
from dataclasses import dataclass
from typing import Any

import torch

SAMPLES_PER_TENSOR = 256


@dataclass(frozen=True)
class Origin:
    """What the caller asked for, as far as it is known."""

    name: str
    revision: str | None = None


_ORIGINS: weakref.WeakKeyDictionary[Any, Origin] = weakref.WeakKeyDictionary()


def remember(model: Any, origin: Origin) -> None:
    """Note where a model came from, for as long as it lives."""
    _ORIGINS[model] = origin


def origin_of(model: Any) -> Origin:
    """What is known of a model's origin; a model the caller built has its config's name."""
    if model in _ORIGINS:
        return _ORIGINS[model]
    name = getattr(model.cfg, "model_name", None) or type(model).__name__
    return Origin(str(name).rstrip("/").rsplit("/", 1)[-1])


@torch.no_grad()
def fingerprint(model: Any) -> str:
    """Short sha256 over names, shapes and an even sample of every parameter.

    Tells checkpoints, quantisations and dtypes apart at a thousandth of the cost of a full hash;
    it is no protection against somebody who wants two models to look alike.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().flatten()
        step = max(1, flat.numel() // SAMPLES_PER_TENSOR)
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(flat[::step].cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]
