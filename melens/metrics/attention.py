"""What an attention pattern says: how much each key gets, and how spread a query looks."""

from __future__ import annotations

import torch
from einops import einsum, reduce  # pyright: ignore[reportUnknownVariableType]  (of its reductions)
from jaxtyping import Float
from torch import Tensor

from melens.errors import MetricError

Pattern = Float[Tensor, "*group query key"]
"""Attention after the softmax: causal, a row sums to 1 (less where padding was dropped)."""


def key_attention(pattern: Pattern) -> Float[Tensor, "*group key"]:
    """alpha[k] = mean over queries i >= k of A[i, k], in [0, 1].

    Raises:  MetricError: the pattern is not square.
    Source:  Gu et al., "When Attention Sink Emerges in Language Models", 2024: their alpha, with
             their T as the number of queries.
    """
    n = pattern.shape[-1]
    if pattern.shape[-2] != n or not n:
        raise MetricError(f"a pattern must be square, got {tuple(pattern.shape[-2:])}.")
    counts = torch.arange(n, 0, -1, dtype=torch.float64)
    # divided on the CPU: not every device has float64
    return reduce(pattern.float(), "... query key -> ... key", "sum").cpu().double() / counts


def attention_entropy(pattern: Pattern) -> Float[Tensor, "*group query"]:
    """-sum_k A[i, k] log A[i, k] of every query, in nats, in [0, log(i + 1)]."""
    logs = pattern.clamp_min(torch.finfo(pattern.dtype).tiny).log()
    return -einsum(pattern, logs, "... query key, ... query key -> ... query")


def uniform_alpha(n: int) -> float:
    """Alpha of the first key if every query looked at all its keys alike: mean of 1 / (i + 1)."""
    return float((1 / torch.arange(1, n + 1, dtype=torch.float64)).mean())
