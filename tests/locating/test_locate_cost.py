"""What a reducer costs beside the forward pass: few operations, however many sequences."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from melens.batches import Batch
from melens.errors import ModelError
from melens.locating.profile import LayerProfile

WIDTH = 16
MOST = 20
"""Operations on whole layers that LayerProfile may take, for any number of sequences."""
EACH = 10
"""More for each sequence: the few rows that matter are picked."""


class Counting(TorchDispatchMode):
    """Counts operations that reach the dispatcher; views and item() included."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def operations(n, padded):
    x = torch.randn(n, 24, WIDTH, generator=torch.Generator().manual_seed(n))
    x[:, 0, 3] = 5000.0
    mask = torch.ones(n, 24, dtype=torch.bool)
    mask[:, 20:] = not padded
    batch = Batch.of(torch.arange(24).repeat(n, 1), mask)
    with Counting() as counting:
        LayerProfile().update(x, batch)
    return counting.names


@pytest.mark.parametrize("padded", [False, True])
def test_a_layer_takes_few_operations_for_any_number_of_sequences(padded):
    """One finiteness scan and one median a row, as before, were over 50 a sequence."""
    one, many = operations(1, padded), operations(9, padded)
    assert len(one) <= MOST + EACH
    assert len(many) - len(one) <= 8 * EACH
    assert not [name for name in many if "median" in name]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_bit_whatever_it_holds(side):
    x = torch.randn(2, 12, WIDTH, generator=torch.Generator().manual_seed(3))
    x[1, 4, 7] = -7000.0
    ids = torch.arange(24).reshape(2, 12)
    alone, together = LayerProfile(), LayerProfile()
    alone.update(x[:1], Batch.of(ids[:1]))
    alone.update(x[1:, 2:9], Batch.of(ids[1:, 2:9]))
    mask = torch.ones(2, 12, dtype=torch.bool)
    short = slice(0, 7) if side == "right" else slice(5, 12)
    mask[1] = False
    mask[1, short] = True
    padded, padded_ids = x.clone(), ids.clone()
    padded[1], padded_ids[1] = torch.nan, 0
    padded[1, short], padded_ids[1, short] = x[1, 2:9], ids[1, 2:9]
    together.update(padded, Batch.of(padded_ids, mask))
    assert together.result() == alone.result()
    assert together.result()[1].hits[0].token_id == ids[1, 4]


def test_values_too_large_for_float32_say_so():
    x = torch.ones(1, 5, 4)
    x[0, 2, 1] = 3e25
    with pytest.raises(ModelError, match=r"activations up to 3e\+25, too large for float32"):
        LayerProfile("blocks.0.x").update(x, Batch.of(torch.zeros(1, 5, dtype=torch.long)))
