"""Next-token losses."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from melens.shapes import TokenIds, TokenMask


def next_token_loss(
    logits: Float[Tensor, "batch pos vocab"], ids: TokenIds, mask: TokenMask
) -> Float[Tensor, "batch pos"]:
    """Cross-entropy of the token at every position, given those before it; in nats, float32.

    Args:    logits: of the same rows as ``ids``.
             mask: True at real tokens.
    Returns: 0 at each row's first real token and at padding, which nothing predicts.
    """
    before = logits[:, :-1].float()
    found = before.logsumexp(-1) - before.gather(-1, ids[:, 1:, None])[..., 0]
    counted = mask[:, 1:] & mask[:, :-1]
    return torch.nn.functional.pad(torch.where(counted, found, 0.0), (1, 0))


def nll(
    log_p: Float[Tensor, "token vocab"], wanted: Int[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """-ln p of one token at every position, nats.

    Args:    log_p: natural logs of the distributions that predict them.
    """
    return -log_p.gather(-1, wanted[:, None])[:, 0]


def sequence_loss(
    logits: Float[Tensor, "batch pos vocab"], ids: TokenIds, mask: TokenMask
) -> Float[Tensor, " batch"]:
    """Mean of :func:`next_token_loss` over each row's predicted tokens."""
    counts = (mask[:, 1:] & mask[:, :-1]).sum(-1).clamp_min(1)
    return next_token_loss(logits, ids, mask).sum(-1) / counts
