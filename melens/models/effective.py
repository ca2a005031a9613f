"""The weights that a module acts with. An adapter beside a matrix, or a quantised one, is not seen
in ``.weight``; what the module makes of known inputs shows it.
"""  # noqa: D205

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from melens.errors import ModelError, SiteError

LINEAR, CONV1D = "torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D"
ROWS, CHUNK = 3, 512
TOLERANCE, HALF_TOLERANCE = 1e-4, 4e-2
"""Of the largest entry that a row makes: sums run in another order, and half precision rounds in
steps of 2^-8; int8 activations, the finest that is not linear, are off by 1e-2 in float32.
"""
GAIN_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


def matrix_of(
    module: Any, stored: Callable[[], Tensor | None]
) -> Float[Tensor, "inside outside"] | None:
    """W such that the module makes ``x @ W`` of x, beside what it makes of zeros.

    Args:    module: the module that runs, or None where there is none of its own.
             stored: reads the matrix that is kept, in this orientation; None where it cannot be.
    Raises:  SiteError: the module does not act as any matrix.
    """  # fmt: skip
    kept = _or_none(stored)
    if module is None or _is_plain(module):
        return kept
    for matrix in _candidates(module, kept):
        if _explains(module, matrix):
            return matrix.to(matrix.dtype if kept is None else kept.dtype)
    raise SiteError(
        f"a {type(module).__name__} does not act as one matrix (quantised activations, or an "
        "adapter that is not linear), so its weights cannot be read; merge or dequantise it first."
    )


def require_gain(norm: nn.Module, gain: Tensor, *, where: str) -> None:
    """Refuse a gain that is not what the norm multiplies by (an adapter of its own).

    A row of +1 and -1 has mean 0 and norm 1, so RMSNorm and LayerNorm leave it as it is but for
    the gain; the bias falls out of the difference to its mirror image.

    Raises:  ModelError: naming the norm.
    """
    if len(gain) % 2:
        return
    weight: Any = getattr(norm, "weight", gain)
    row = torch.ones(len(gain), dtype=weight.dtype, device=weight.device)
    row[1::2] = -1
    with torch.no_grad():
        made = (norm.forward(row[None, None]) - norm.forward(-row[None, None]))[0, 0] / 2
    off = ((made * row).float() - gain.to(made.device)).abs().max() / gain.abs().max().clamp_min(1)
    if not off <= GAIN_TOLERANCE.get(weight.dtype, 1e-3):
        raise ModelError(
            f"{where} does not multiply by its stored gain (off by {off:.1e}), as with an adapter "
            "on it; merge the adapter first."
        )


def is_adapted(model: nn.Module) -> bool:
    """Whether a PEFT adapter's layers stand in a model, unmerged."""
    return any(hasattr(part, "active_adapters") and hasattr(part, "merged_adapters") for part in
               model.modules())  # fmt: skip


def _candidates(module: Any, kept: Tensor | None) -> Iterator[Tensor]:
    if kept is not None:
        yield kept if (added := _added(module, kept)) is None else kept + added
    yield _probed(module)


def _added(module: Any, kept: Tensor) -> Tensor | None:
    """What PEFT's active adapters add to a matrix, where they say so."""
    if not hasattr(module, "get_delta_weight") or getattr(module, "merged", False):
        return None
    if getattr(module, "disable_adapters", False):
        return None
    made = torch.zeros_like(kept)
    for name in module.active_adapters:
        if name in getattr(module, "lora_A", {}):
            delta = module.get_delta_weight(name).detach().to(kept)
            made += delta if _kind(module.base_layer) == CONV1D else delta.T
    return made


def _is_plain(module: Any) -> bool:
    """By the class itself: PEFT and quantisers call theirs Linear too."""
    return _kind(module) in (LINEAR, CONV1D) and "forward" not in vars(module)


def _kind(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


@torch.no_grad()
def _probed(module: Any) -> Float[Tensor, "inside outside"]:
    """Row n is what the module makes of the n-th unit vector."""
    inside = _inside(module)
    zero = _run(module, _like(module, torch.zeros(1, inside)))
    eye = torch.eye(inside)
    parts = [_run(module, _like(module, rows)) - zero for rows in eye.split(CHUNK)]
    return torch.cat(parts)


@torch.no_grad()
def _explains(module: Any, matrix: Tensor) -> bool:
    rows = torch.randn(ROWS, len(matrix), generator=torch.Generator().manual_seed(0))
    given = _like(module, rows)
    made = (_run(module, given) - _run(module, torch.zeros_like(given))).float()
    expected = given.float() @ matrix.to(given.device).float()
    limit = TOLERANCE if given.dtype.itemsize > 2 else HALF_TOLERANCE
    scale = made.abs().amax(-1).clamp_min(1e-12)
    return bool(((made - expected).abs().amax(-1) <= limit * scale).all())


def _run(module: Any, x: Tensor) -> Tensor:
    """Past the hooks on the module: an open edit is no part of its weights."""
    return module.forward(x).detach()


def _like(module: Any, x: Tensor) -> Tensor:
    """In the dtype and on the device of what the module computes with."""
    values = [*module.parameters(), *module.buffers()]
    wide = next((v for v in values if v.is_floating_point() and v.dtype.itemsize > 1), None)
    device = values[0].device if values else x.device
    return x.to(device, torch.float32 if wide is None else wide.dtype)


def _inside(module: Any) -> int:
    size = getattr(module, "in_features", None)
    if not isinstance(size, int):
        raise SiteError(
            f"the weights of a {type(module).__name__} cannot be read, and it does not say how "
            "wide its input is; dequantise the model first."
        )
    return size


def _or_none(stored: Callable[[], Tensor | None]) -> Tensor | None:
    try:
        found = stored()
    except NotImplementedError:  # TransformerLens: the storage is packed, or split from its scales
        return None
    return found.detach() if isinstance(found, Tensor) else None
