"""The most that one FFN neuron can write into one residual coordinate, from weights alone.

A norm puts its output z on a sphere: |z|^2 = d * ms / (ms + eps) <= d for d dimensions, where ms is
the mean square of what came in (after its mean was taken off, for LayerNorm). So whatever the
input was, |z| <= sqrt(d), and for LayerNorm z also has mean zero. Everything below is a maximum
over that sphere, hence over all inputs.

The activation functions that are covered write t as t * g(t) with 0 <= g <= 1 (ReLU, SiLU and every
GELU; g -> 1 for large t); the square of ReLU has a bound of its own. Two consequences are used:
act(t) <= max(t, 0), and act(t) >= -FLOORS[name], the depth of the function's small dip.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from melens.metrics.magnitude import norms

Neurons = Float[Tensor, " neuron"]

FLOORS = {  # how deep each covered activation dips below zero, rounded up: -min over t of act(t)
    "silu": 0.27847,
    "swish": 0.27847,
    "gelu": 0.16998,
    "gelu_new": 0.17005,
    "gelu_fast": 0.17005,
    "gelu_pytorch_tanh": 0.17005,
    "gelu_python": 0.16998,
    "quick_gelu": 0.16362,
    "relu": 0.0,
    "relu2": 0.0,
}
SQUARED = "relu2"
"""max(t, 0)^2, of FFNs without a gate (Nemotron, Arcee): see :func:`squared_reach`."""


class CeilingReach(NamedTuple):
    """The largest and the smallest value that each neuron's activation can take, as sizes."""

    positive: Neurons
    negative: Neurons
    """Size of the most negative value; 0 where it cannot go below zero."""

    @property
    def largest(self) -> Neurons:
        """Whichever of the two is larger."""
        return torch.maximum(self.positive, self.negative)


class Moments(NamedTuple):
    """What two matrices' rows say of each other once the norm's gain is multiplied in."""

    first: Neurons
    """|w|^2."""
    second: Neurons
    """|u|^2."""
    cross: Neurons
    """w . u."""


def gated_reach(rows: Moments, radius_squared: int) -> CeilingReach:
    """Range of act(w . z) * (u . z) over the sphere |z|^2 = ``radius_squared``.

    Let c be the cosine of w and u. The product (w . z)(u . z) is the quadratic form of the
    symmetric matrix (w u^T + u w^T) / 2, whose two non-zero eigenvalues are |w||u|(c + 1) / 2 and
    |w||u|(c - 1) / 2. So over the sphere it lies between -N and P,

        P = r^2 |w||u| (1 + c) / 2,    N = r^2 |w||u| (1 - c) / 2,

    and P is taken at z = r (w/|w| + u/|u|) / |...|, N at the difference in place of the sum.
    Now act(t) = t * g(t), 0 <= g <= 1, so the activation is that product times g: it has the
    product's sign and never exceeds it. Hence it also lies within [-N, P], both signs apart. Since
    z and -z give the same product, the gate can be taken as positive at either end. There it is
    w . z = r |w| sqrt((1 + c) / 2) at P and r |w| sqrt((1 - c) / 2) at N, and g -> 1 as it grows:
    either end is approached where that number is large against 1, that is where the gate is open.
    The larger of the two is r^2 |w||u| (1 + |c|) / 2. A negative gate alone gives at most
    FLOORS * |u . z|, which is why the sign at the ceiling is that of u . z.

    Args:    rows: of gate (first) and up (second), the norm's gain multiplied in.
             radius_squared: d of the norm; d + 1 where a constant coordinate carries biases.
    """
    sizes = (rows.first * rows.second).clamp(min=0).sqrt()
    cross = torch.minimum(torch.maximum(rows.cross, -sizes), sizes)
    return CeilingReach(radius_squared * (sizes + cross) / 2, radius_squared * (sizes - cross) / 2)


def plain_reach(
    squared: Neurons, offset: Neurons, radius_squared: int, floor: float
) -> CeilingReach:
    """Range of act(w . z + b) over the sphere: t lies in b +- r|w|, both ends taken (z = +- r w/|w|).

    act(t) <= max(t, 0) gives the positive end, the smaller of ``floor`` and -t the negative one.
    So an ungated neuron writes with the sign of its down entry and hardly ever against it. Exact
    for ReLU; for GELU and SiLU the bound is approached as r|w| + b grows.

    Args:    squared: |w|^2, the gain multiplied in. offset: b, and what the norm's own bias adds.
             floor: of the activation, from ``FLOORS``.
    """  # noqa: E501
    sizes = (radius_squared * squared.clamp(min=0)).sqrt()
    below = (sizes - offset).clamp(min=0)
    return CeilingReach((sizes + offset).clamp(min=0), below.clamp(max=floor))


def squared_reach(squared: Neurons, offset: Neurons, radius_squared: int) -> CeilingReach:
    """Range of max(w . z + b, 0)^2 over the sphere: from 0 to (r|w| + b)^2, taken at z = r w/|w|.

    Args:    as :func:`plain_reach`.
    """
    ends = plain_reach(squared, offset, radius_squared, 0.0)
    return CeilingReach(ends.positive.square(), ends.negative)


def on_mean_zero(rows: Moments, sums: tuple[Neurons, Neurons], d: int) -> Moments:
    """The same on LayerNorm's sphere, where z has mean zero: rows lose the mean they have.

    There w . z = (w - mean(w)) . z, and |w - mean(w)|^2 = |w|^2 - sum(w)^2 / d. Where the mean is
    large against the spread, nearly all of |w|^2 is taken off again: give float64 sums.

    Args:    sums: sum(w) and sum(u), the gain multiplied in.
    """
    w, u = sums
    return Moments(
        (rows.first - w * w / d).clamp(min=0),
        (rows.second - u * u / d).clamp(min=0),
        rows.cross - w * u / d,
    )


def with_constant(rows: Moments, offsets: tuple[Neurons, Neurons]) -> Moments:
    """Rows with one more coordinate, in which z is always 1, that carries their biases.

    (z, 1) lies on the sphere of radius^2 d + 1, so the range over that whole sphere is a bound;
    it is no longer reached to the last digit.
    """
    w, u = offsets
    return Moments(rows.first + w * w, rows.second + u * u, rows.cross + w * u)


def row_moments(
    first: Float[Tensor, "neuron d_model"] | None,
    second: Float[Tensor, "neuron d_model"],
    gain: Float[Tensor, " d_model"],
) -> Moments:
    """|gw|^2, |gu|^2 and gw . gu of every row, without a scaled copy of either matrix.

    Args:    first: gate rows; None where there is no gate, and all three are |gu|^2.
    """
    squared = gain * gain
    own = (second * second) @ squared
    if first is None:
        return Moments(own, own, own)
    return Moments((first * first) @ squared, own, (first * second) @ squared)


def alone_after_norm(largest: Neurons, squared: Neurons, d: int) -> Neurons:
    """Most that a neuron writes into one coordinate through an RMSNorm behind the FFN, alone.

    The norm sends y to gain * y * sqrt(d) / |y|, whatever the size of y. If one neuron makes all
    of y, y is along its column of W_down and coordinate k becomes
    sqrt(d) |gain[k]| |W_down[k, n]| / |W_down[:, n]|. This is exact for one dominating neuron and
    is **no bound** for several together: they can cancel outside coordinate k. The bound over all
    inputs is :func:`whole_after_norm`.

    Args:    largest: max over k of |gain[k] W_down[k, n]|. squared: |W_down[:, n]|^2, no gain.
    """
    safe = squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt()
    return torch.where(squared > 0, d**0.5 * largest / safe, torch.zeros_like(largest))


def whole_after_norm(gain: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """Most that a whole FFN writes into each coordinate through an RMSNorm: sqrt(d) |gain[k]|.

    No entry of y exceeds |y|, so no entry of y * sqrt(d) / |y| exceeds sqrt(d).
    """
    return gain.numel() ** 0.5 * gain.abs()


def best_input(
    first: Float[Tensor, " d_model"], second: Float[Tensor, " d_model"] | None, *, mean_zero: bool
) -> Float[Tensor, " d_model"]:
    """Unit normalised input at which a neuron is at its ceiling: what the norm has to put out.

    Gated: w/|w| + u/|u|, or their difference where the cosine is negative (there the write is
    against the sign of the down entry). Plain: w/|w|. Biases are left out.

    Args:    first, second: the neuron's gate and up rows, the gain multiplied in.
    """
    if mean_zero:
        first = first - first.mean()
        second = None if second is None else second - second.mean()
    found = first / norms(first).clamp(min=1e-30)
    if second is not None:
        other = second / norms(second).clamp(min=1e-30)
        found = found + (other if found @ other >= 0 else -other)
    return found / norms(found).clamp(min=1e-30)
