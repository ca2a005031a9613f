"""Eigenvalues of many small symmetric matrices: gathered, then solved on all cores at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

FLUSH_BYTES = 2**25
"""Matrices that wait are solved before they would pass this; one batch of a site may be more."""
SHARE = 32
"""Matrices that a thread takes at a time."""
Matrices = Float[Tensor, "group n n"]
_ALONE = threading.Lock()
"""The number of threads is the process's: two callers must not put back each other's."""
Taker = Callable[[list[Tensor]], None]


@dataclass
class EigenQueue:
    """Takes matrices in, gives each caller its eigenvalues back, at the latest on ``flush``."""

    waiting: list[tuple[list[Tensor], Taker]] = field(default_factory=list)
    held: int = 0

    def submit(self, matrices: list[Tensor], take: Taker) -> None:
        """``take`` is called with the eigenvalues ``[group, n]`` of every ``[group, n, n]``."""
        size = sum(matrix.numel() * matrix.element_size() for matrix in matrices)
        if self.held + size > FLUSH_BYTES:
            self.flush()
        self.waiting.append((matrices, take))
        self.held += size

    def flush(self) -> None:
        """Solve everything that waits."""
        ready, self.waiting, self.held = self.waiting, [], 0
        solved = iter(solve([matrix for matrices, _ in ready for matrix in matrices]))
        for matrices, take in ready:
            take([next(solved) for _ in matrices])


def solve(batches: list[Tensor]) -> list[Tensor]:
    """Ascending eigenvalues ``[group, n]`` of every ``[group, n, n]``.

    LAPACK takes matrices one after another, and its own threads gain nothing on small ones (288 of
    64 x 64: 31 ms with one thread and with two, 16 ms on two threads of ours): each of ours takes
    a share, and for that time torch is told to use one thread a call.
    """
    if any(batch.device.type != "cpu" for batch in batches):
        return [torch.linalg.eigvalsh(batch) for batch in batches]
    shares = [batch.split(SHARE) for batch in batches]
    with _ALONE:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(threads) as pool:
                parts = [part for share in shares for part in share]
                done = pool.map(torch.linalg.eigvalsh, parts)
                return [torch.cat([next(done) for _ in share]) for share in shares]
        finally:
            torch.set_num_threads(threads)
