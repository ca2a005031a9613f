"""Caches that a block is called with: one records keys and values, one puts recorded ones first."""

from __future__ import annotations

from typing import Any

import torch
from einops import repeat
from torch import Tensor


class Keeping:
    """A cache that notes the keys and values it is shown, and hands them back as they are."""

    def __init__(self) -> None:
        self.pair: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        """``[batch, head, pos, d]`` keys and values of the whole sequences."""
        self.pair = (keys.detach(), values.detach())
        return keys, values

    def get_seq_length(self, *rest: Any) -> int:
        """Nothing came before."""
        return 0


class Prefix:
    """A cache that puts recorded keys and values before new ones, and changes nothing."""

    def __init__(self, pair: tuple[Tensor, Tensor], start: int, copies: int) -> None:
        self.pair = tuple(
            repeat(x[:, :, :start], "row head pos d -> (copy row) head pos d", copy=copies)
            for x in pair
        )
        self.start = start

    def update(self, keys: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        """The whole sequences' keys and values."""
        before_k, before_v = self.pair
        return torch.cat([before_k, keys], dim=-2), torch.cat([before_v, values], dim=-2)

    def get_seq_length(self, *rest: Any) -> int:
        """Positions before the new ones."""
        return self.start
