"""Where a loaded model came from, kept beside it and never inside it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from melens.placement import filled_state
from melens.protocols import HookedModel, transformers_of
from melens.store import hash_tensors

SAMPLES_PER_TENSOR = 256


@dataclass(frozen=True)
class Origin:
    """What the caller asked for, as far as it is known."""

    name: str
    revision: str | None = None
    weights: str | None = None
    """:func:`fingerprint`, where the weights cannot be read from the model itself."""
    also: tuple[str, ...] = ()
    """What a ``.gguf`` file says that the model is called."""


_ORIGINS: weakref.WeakKeyDictionary[object, Origin] = weakref.WeakKeyDictionary()


def remember(model: HookedModel, origin: Origin) -> None:
    """Note where a model came from, for as long as it lives."""
    _ORIGINS[model] = origin


def name_of(path: str) -> str:
    """What results call a model that was read from ``path``: a folder's last part, or a hub id."""
    path = path.rstrip("/")
    is_id = path.count("/") == 1 and not path.startswith((".", "/", "~"))
    return path if is_id and not Path(path).is_dir() else path.rsplit("/", 1)[-1]


def origin_of(model: HookedModel) -> Origin:
    """What is known of a model's origin; a model the caller built has its config's name."""
    if model in _ORIGINS:
        return _ORIGINS[model]
    name = getattr(model.cfg, "model_name", None) or type(model).__name__
    return Origin(str(name).rstrip("/").rsplit("/", 1)[-1])


@torch.no_grad()
def fingerprint(model: HookedModel) -> str:
    """Short sha256 over names, shapes and an even sample of every parameter.

    Tells checkpoints, quantisations and dtypes apart at a thousandth of the cost of a full hash;
    it is no protection against somebody who wants two models to look alike.
    """
    if model in _ORIGINS and (known := _ORIGINS[model].weights):
        return known
    with filled_state(transformers_of(model), sample) as filled:
        state = model.state_dict()
        return digest_of((n, filled.get(id(x)) or sample(x)) for n, x in state.items())


@dataclass(frozen=True)
class Sample:
    """A few evenly spaced values of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    values: torch.Tensor
    """float64, on the CPU."""


def sample(value: torch.Tensor) -> Sample:
    """Every n-th value, in the order of the memory."""
    flat = value.detach().flatten()
    return Sample(tuple(value.shape), value.dtype, flat[:: stride_of(flat.numel())].cpu().double())


def stride_of(count: int) -> int:
    """The n of :func:`sample` for a tensor of so many values."""
    return max(1, count // SAMPLES_PER_TENSOR)


def digest_of(samples: Iterable[tuple[str, Sample]]) -> str:
    """The fingerprint of named samples, whatever their order."""
    ordered = sorted(samples, key=lambda item: item[0])
    return hash_tensors((f"{name}{made.shape}{made.dtype}", made.values) for name, made in ordered)
