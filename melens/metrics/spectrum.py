"""How many directions a set of vectors fills: functions of its singular values.

Every definition is a function of its own, and its centred form (the mean row taken off first) is
another. The ``*_of`` forms take singular values, for callers that have them already.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import reduce  # pyright: ignore[reportUnknownVariableType]  (of its reductions)
from jaxtyping import Float
from torch import Tensor

from melens.errors import MetricError
from melens.metrics.magnitude import Rows, metric, require_finite
from melens.registry import Registry

Spectrum = Float[Tensor, "*group value"]
"""Singular values, the last axis; zeros do not count."""
SPECTRAL: Registry[Callable[[Tensor], Tensor]] = Registry("spectral definition")
"""Definition -> function of singular values. A seam: add one, and collapse has it."""


def singular_values(x: Rows) -> Float[Tensor, " value"]:
    """Singular values of the rows as they are, float64.

    Raises:  MetricError: x is empty, not finite or all zero.
    """
    require_finite(x, "a spectrum")
    return _nonzero(_values_of(x.double()), "a spectrum")


def singular_values_centred(x: Rows) -> Float[Tensor, " value"]:
    """Singular values of the rows less their mean row, float64.

    Raises:  MetricError: x is empty or not finite, or all its rows are equal.
    """
    require_finite(x, "a centred spectrum")
    centred = x.double() - x.double().mean(dim=-2, keepdim=True)
    return _nonzero(_values_of(centred), "a centred spectrum")


def _values_of(x: Tensor) -> Tensor:
    return torch.linalg.svdvals(x)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]  (torch does not say)


def _nonzero(s: Tensor, name: str) -> Tensor:
    if not (s > 0).any():
        raise MetricError(f"{name} is undefined: all rows are zero (or equal, where centred).")
    return s


def entropy_terms(p: Tensor) -> Tensor:
    """-p log p of every share, in nats; 0 where the share is 0."""
    return torch.special.entr(p)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]  (torch does not say)


@SPECTRAL.register("effective_rank")
def effective_rank_of(s: Spectrum) -> Float[Tensor, "*group"]:
    """exp(-sum p log p), p = s / sum(s), in nats."""
    p = s / reduce(s, "... value -> ... 1", "sum")
    return reduce(entropy_terms(p), "... value -> ...", "sum").exp()


@SPECTRAL.register("participation_ratio")
def participation_ratio_of(s: Spectrum) -> Float[Tensor, "*group"]:
    """(sum s^2)^2 / sum s^4."""
    q = _energy(s)
    return 1 / reduce(q**2, "... value -> ...", "sum")


@SPECTRAL.register("stable_rank")
def stable_rank_of(s: Spectrum) -> Float[Tensor, "*group"]:
    """Sum s^2 / max s^2."""
    return 1 / reduce(_energy(s), "... value -> ...", "max")


@SPECTRAL.register("matrix_entropy")
def matrix_entropy_of(s: Spectrum) -> Float[Tensor, "*group"]:
    """-sum q log q, q = s^2 / sum(s^2), in nats."""
    return reduce(entropy_terms(_energy(s)), "... value -> ...", "sum")


@SPECTRAL.register("top1_share")
def top1_share_of(s: Spectrum) -> Float[Tensor, "*group"]:
    """Max s^2 / sum s^2."""
    return reduce(_energy(s), "... value -> ...", "max")


def _energy(s: Tensor) -> Tensor:
    # scaled first: the squares of very small or very large values would leave float64's range
    s = s / reduce(s, "... value -> ... 1", "max")
    return s**2 / reduce(s**2, "... value -> ... 1", "sum")


@metric("effective_rank", unit="dimensions", scale_invariant=True)
def effective_rank(x: Rows) -> Float[Tensor, ""]:
    """Effective rank exp(H(p)), p_i = s_i / sum(s), s = singular values (uncentred, H in nats).

    Returns: dimensions, in [1, min(sample, d_model)]; 1 = all samples on one line.
    Raises:  MetricError: x is empty, all zero or not finite.
    Source:  Roy & Vetterli, "The effective rank: a measure of effective dimensionality",
             EUSIPCO 2007, definition 1.
    """
    return effective_rank_of(singular_values(x))


@metric("effective_rank_centred", unit="dimensions", scale_invariant=True)
def effective_rank_centred(x: Rows) -> Float[Tensor, ""]:
    """:func:`effective_rank` of the rows less their mean row.

    Raises:  MetricError: x is empty or not finite, or all its rows are equal.
    """
    return effective_rank_of(singular_values_centred(x))


@metric("participation_ratio", unit="dimensions", scale_invariant=True)
def participation_ratio(x: Rows) -> Float[Tensor, ""]:
    """Participation ratio (sum s^2)^2 / sum s^4, in [1, rank]; uncentred.

    Raises:  MetricError: x is empty, all zero or not finite.
    Source:  Gao et al., "A theory of multineuronal dimensionality", 2017, with s^2 the
             eigenvalues of the second-moment matrix in place of the covariance.
    """
    return participation_ratio_of(singular_values(x))


@metric("participation_ratio_centred", unit="dimensions", scale_invariant=True)
def participation_ratio_centred(x: Rows) -> Float[Tensor, ""]:
    """:func:`participation_ratio` of the rows less their mean row: the covariance's own.

    Raises:  MetricError: x is empty or not finite, or all its rows are equal.
    """
    return participation_ratio_of(singular_values_centred(x))


@metric("stable_rank", unit="dimensions", scale_invariant=True)
def stable_rank(x: Rows) -> Float[Tensor, ""]:
    """Stable rank sum s^2 / max s^2 = |X|_F^2 / |X|_2^2, in [1, rank]; uncentred.

    Raises:  MetricError: x is empty, all zero or not finite.
    Source:  Rudelson & Vershynin, "Sampling from large matrices", 2007 (numerical rank).
    """
    return stable_rank_of(singular_values(x))


@metric("stable_rank_centred", unit="dimensions", scale_invariant=True)
def stable_rank_centred(x: Rows) -> Float[Tensor, ""]:
    """:func:`stable_rank` of the rows less their mean row.

    Raises:  MetricError: x is empty or not finite, or all its rows are equal.
    """
    return stable_rank_of(singular_values_centred(x))


@metric("matrix_entropy", unit="nats", scale_invariant=True)
def matrix_entropy(x: Rows) -> Float[Tensor, ""]:
    """Von Neumann entropy -sum q log q, q = s^2 / sum s^2, in [0, log rank] nats; uncentred.

    Raises:  MetricError: x is empty, all zero or not finite.
    Source:  Skean et al., "Layer by Layer", 2025, section 3 (matrix-based entropy, alpha -> 1).
    """
    return matrix_entropy_of(singular_values(x))


@metric("matrix_entropy_centred", unit="nats", scale_invariant=True)
def matrix_entropy_centred(x: Rows) -> Float[Tensor, ""]:
    """:func:`matrix_entropy` of the rows less their mean row.

    Raises:  MetricError: x is empty or not finite, or all its rows are equal.
    """
    return matrix_entropy_of(singular_values_centred(x))


@metric("top1_share", unit="share", scale_invariant=True)
def top1_share(x: Rows) -> Float[Tensor, ""]:
    """Share of the rows' energy in their top direction, max s^2 / sum s^2, in (0, 1]; uncentred.

    The reciprocal of the stable rank, for one matrix; of means over matrices it is not.

    Raises:  MetricError: x is empty, all zero or not finite.
    Source:  the explained-variance ratio of a first principal component, uncentred.
    """
    return top1_share_of(singular_values(x))


@metric("top1_share_centred", unit="share", scale_invariant=True)
def top1_share_centred(x: Rows) -> Float[Tensor, ""]:
    """:func:`top1_share` of the rows less their mean row: a first component's explained variance.

    Raises:  MetricError: x is empty or not finite, or all its rows are equal.
    """
    return top1_share_of(singular_values_centred(x))
