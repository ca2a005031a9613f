"""Rows that a trajectory is made of."""

from __future__ import annotations

import torch

from melens.batches import Batch
from melens.locating.trajectory import LastRow


def test_the_last_real_row_of_every_sequence_batch_by_batch():
    x = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(20).reshape(5, 4)
    mask = torch.ones(5, 4, dtype=torch.bool)
    mask[1, 2:], mask[3, :1] = False, False  # padded behind, and in front
    tap = LastRow()
    for part in (slice(0, 2), slice(2, 5)):
        tap.update(x[part], Batch.of(ids[part], mask[part]))
    last = [3, 1, 3, 3, 3]
    assert tap.result().equal(x[range(5), last].double())
