"""How far two next-token distributions are apart."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

LogP = Float[Tensor, "token vocab"]


def kl_divergence(log_p: LogP, log_q: LogP) -> Float[Tensor, " token"]:
    """KL(p || q), nats; rounding can leave it below 0 by the last digits of a float.

    Args:    log_p, log_q: natural logs of the two distributions.
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def same_top1(log_p: LogP, log_q: LogP) -> Bool[Tensor, " token"]:
    """Whether both put the same token first."""
    return log_p.argmax(-1) == log_q.argmax(-1)
