"""Along which direction a token grows, and which block adds how much of it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from melens.errors import MetricError
from melens.metrics.spectrum import entropy_terms
from melens.shapes import Trajectory


def write_shares(
    writes: Float[Tensor, "layer d_model"], end: Float[Tensor, " d_model"]
) -> Float[Tensor, " layer"]:
    """Share of ``end`` that each write makes: s[l] = (w[l] . v) / (end . v), v = end / |end|.

    Over all writes up to the peak, together with the embedding's own share, they sum to 1
    (the residual stream adds up). A negative share erases.

    Args:    writes: what each block adds to the token, post-norms included, residual units.
             end: the token's residual at its peak layer.
    Raises:  MetricError: ``end`` is zero.
    """
    end = end.double()
    squared = end @ end
    if squared == 0:
        raise MetricError("write_shares is undefined for a zero end vector.")
    return (writes.double() @ end) / squared


def effective_number(shares: Float[Tensor, " layer"]) -> float:
    """exp(entropy) of the positive shares: 1 = one layer did it all, n = n did alike.

    Raises:  MetricError: no share is positive.
    """
    p = shares.double().clamp(min=0)
    if p.sum() == 0:
        raise MetricError("effective_number is undefined: no positive share.")
    p = p / p.sum()
    return entropy_terms(p).sum().exp().item()


def cosines(trajectory: Trajectory, direction: Float[Tensor, " d_model"]) -> Float[Tensor, " step"]:
    """Cosine of every step of a trajectory with one direction, in [-1, 1]; 0 for a zero vector."""
    return torch.nn.functional.cosine_similarity(
        trajectory.double(), direction.double()[None], dim=-1
    )
