"""Eigenvalues of many small symmetric matrices: gathered, then solved on all cores at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

FLUSH_BYTES = 2**25
"""Matrices that wait; more are solved before the next is taken in, so memory stays bounded."""
SHARE = 32
"""Matrices that a thread takes at a time."""
Matrices = Float[Tensor, "group n n"]
Taker = Callable[[list[Tensor]], None]


@dataclass
class EigenQueue:
    """Takes matrices in, gives each caller its eigenvalues back, at the latest on ``flush``."""

    waiting: list[tuple[list[Tensor], Taker]] = field(default_factory=list)
    held: int = 0

    def submit(self, matrices: list[Tensor], take: Taker) -> None:
        """``take`` is called with the eigenvalues ``[group, n]`` of every ``[group, n, n]``."""
        self.waiting.append((matrices, take))
        self.held += sum(matrix.numel() * matrix.element_size() for matrix in matrices)
        if self.held >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Solve everything that waits."""
        ready, self.waiting, self.held = self.waiting, [], 0
        solved = iter(solve([matrix for matrices, _ in ready for matrix in matrices]))
        for matrices, take in ready:
            take([next(solved) for _ in matrices])


def solve(batches: list[Tensor]) -> list[Tensor]:
    """Ascending eigenvalues ``[group, n]`` of every ``[group, n, n]``.

    LAPACK takes matrices one after another, and its own threads gain nothing on small ones: each
    of ours takes a share, and for that time torch is told to use one thread a call.
    """
    threads = torch.get_num_threads()
    if threads == 1 or any(batch.device.type != "cpu" for batch in batches):
        return [torch.linalg.eigvalsh(batch) for batch in batches]
    shares = [batch.split(SHARE) for batch in batches]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            done = pool.map(torch.linalg.eigvalsh, [part for share in shares for part in share])
            return [torch.cat([next(done) for _ in share]) for share in shares]
    finally:
        torch.set_num_threads(threads)
