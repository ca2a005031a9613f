"""Rounding by the libraries' own primitives: compressed-tensors' grids, gguf's block formats."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float
from torch import Tensor

from melens.errors import ModelError
from melens.protocols import JsonObject
from melens.quantising.schemes import Grid

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

GROUPS = (128, 64, 32)
SCALE_BITS = 16
"""What engines keep a scale in."""
Matrix = Float[Tensor, "*expert outside inside"]


@dataclass(frozen=True)
class Packed:
    """A matrix as an engine keeps it: codes and scales, dense again where it is multiplied."""

    grid: Grid | str
    codes: Tensor
    """Of the matrix's shape, a byte each; of a GGUF format its blocks, ``[outside, bytes]``."""
    scale: Tensor | None
    group: int | None

    @property
    def bits(self) -> float:
        """Bits a weight, scales included."""
        if isinstance(self.grid, str):
            return 8 * self.codes.numel() / self._gguf_weights()
        assert self.scale is not None
        return self.grid.bits + SCALE_BITS * self.scale.numel() / self.codes.numel()

    @property
    def held(self) -> int:
        """Bytes of memory."""
        return self.codes.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def dense(self, dtype: torch.dtype) -> Matrix:
        """What the matrix's user multiplies by."""
        if isinstance(self.grid, str):
            return _from_gguf(self.codes, self.grid).to(self.codes.device, dtype)
        from compressed_tensors.quantization.lifecycle.forward import dequantize

        assert self.scale is not None
        zero = torch.zeros_like(self.scale)
        args = _args(self.grid, self.group)
        made = dequantize(self.codes, self.scale, zero, args, dtype=torch.float32)
        return made.to(dtype)

    def _gguf_weights(self) -> int:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[cast("str", self.grid)]]
        return self.codes.numel() // size * weights


@torch.no_grad()
def packed(matrix: Matrix, grid: Grid | str) -> Packed:
    """Round a matrix that :func:`require_divides` takes; what shares a scale lies along inside."""
    wide = matrix.detach().float()
    if isinstance(grid, str):
        return Packed(grid, _to_gguf(wide, grid).to(matrix.device), None, None)
    from compressed_tensors.quantization.lifecycle.forward import quantize

    group = group_of(wide.shape[-1]) if grid.per == "group" else None
    parts = wide if group is None else wide.unflatten(-1, (-1, group))
    over = tuple(range(wide.ndim)) if grid.per == "tensor" else (-1,)
    scale = scale_of(grid, parts.abs().amax(over, keepdim=True), group)
    if group is not None:
        scale = scale[..., 0]
    kind = torch.int8 if grid.kind == "int" else torch.float8_e4m3fn
    codes = quantize(wide, scale, torch.zeros_like(scale), _args(grid, group), dtype=kind)
    return Packed(grid, codes, scale, group)


def group_of(width: int) -> int:
    """The largest of GROUPS that divides a row."""
    return next(size for size in GROUPS if width % size == 0)


def require_divides(width: int, grid: Grid | str | None, name: str) -> None:
    """Refuse a matrix whose rows cannot be cut into what shares a scale.

    Raises:  ModelError: naming it.
    """
    blocks = isinstance(grid, str) or (grid is not None and grid.per == "group")
    if blocks and width % GROUPS[-1]:
        raise ModelError(
            f"the rows of {name} have {width} weights, which do not divide into blocks of "
            f"{GROUPS[-1]}; choose a scheme with a scale per channel."
        )


def scale_of(grid: Grid, largest: Tensor, group: int | None = None) -> Tensor:
    """A grid's step for the largest |x| that shares it."""
    if grid.scale is not None:
        return torch.full_like(largest, grid.scale)
    from compressed_tensors.quantization.utils import calculate_qparams

    return calculate_qparams(-largest, largest, _args(grid, group))[0].reshape(largest.shape)


def rounded(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Values of a grid with a scale that broadcasts to ``x``; cut where they are larger."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    found = fake_quantize(x.float(), scale, torch.zeros_like(scale), _args(grid, None))
    return found.to(x.dtype)


@lru_cache(maxsize=64)
def _args(grid: Grid, group: int | None) -> QuantizationArgs:
    """A grid in compressed-tensors' words; scales that broadcast are all alike to it."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy

    given: JsonObject = {"num_bits": grid.bits, "type": grid.kind, "symmetric": True}
    if group is not None:
        return QuantizationArgs(**given, strategy=QuantizationStrategy.GROUP, group_size=group)
    whole = grid.per == "tensor"
    strategy = QuantizationStrategy.TENSOR if whole else QuantizationStrategy.CHANNEL
    return QuantizationArgs(**given, strategy=strategy)


def _to_gguf(matrix: Matrix, name: str) -> Tensor:
    from gguf import GGMLQuantizationType, quants

    return torch.from_numpy(quants.quantize(matrix.cpu().numpy(), GGMLQuantizationType[name]))


def _from_gguf(codes: Tensor, name: str) -> Tensor:
    from gguf import GGMLQuantizationType, quants

    return torch.from_numpy(quants.dequantize(codes.cpu().numpy(), GGMLQuantizationType[name]))
