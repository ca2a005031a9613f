"""How large activations are: maxima, medians and the ratios between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from melens.errors import MetricError
from melens.registry import Registry

SUN_ABSOLUTE = 100.0
"""Sun et al. 2024: a massive activation exceeds 100 ..."""
SUN_RATIO = 1000.0
"""... and 1000 times the median |x|."""
NORM_RATIO = 5.0
"""A massive token weighs at least this many times the median token norm. The heaviest token's
ratio in docs/results: SmolLM2 1.3 to 2.5 where nothing is massive, 10 in its first stage, 180 after
the ME Layer; Gemma-3-270M 7 to 17 over layers 3 to 9."""
Rows = Float[Tensor, "sample d_model"]
"""One row per real token; padding dropped."""


@dataclass(frozen=True)
class Metric:
    """A registered metric: the function, its unit, and whether scaling the input changes it."""

    fn: Callable[[Tensor], Tensor]
    unit: str
    scale_invariant: bool


METRICS: Registry[Metric] = Registry("metric")


def metric(
    name: str, *, unit: str, scale_invariant: bool
) -> Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]:
    """Register a function of ``[sample, d_model]`` activations; it stays a plain function."""

    def add(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        METRICS.add(name, Metric(fn, unit, scale_invariant))
        return fn

    return add


def require_finite(x: Tensor, name: str) -> None:
    """Raise MetricError where ``x`` is empty or holds NaN or Inf."""
    if x.numel() == 0:
        raise MetricError(f"{name} got an empty tensor of shape {tuple(x.shape)}; give it a token.")
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise MetricError(
            f"{name} got {bad} non-finite values in {tuple(x.shape)}; "
            "load the model in float32 or mask padding first."
        )


@metric("max_magnitude", unit="residual units", scale_invariant=False)
def max_magnitude(x: Rows) -> Float[Tensor, ""]:
    """Largest |x| over all tokens and dimensions, in residual units.

    Raises:  MetricError: x is empty or not finite.
    Source:  Sun et al., "Massive Activations in Large Language Models", 2024, section 2.
    """
    require_finite(x, "max_magnitude")
    return x.abs().max()


@metric("layer_median", unit="residual units", scale_invariant=False)
def layer_median(x: Rows) -> Float[Tensor, ""]:
    """Median |x| over all tokens and dimensions (the lower one of an even count).

    Raises:  MetricError: x is empty or not finite.
    Source:  Sun et al. 2024, section 2: the reference of their ratio of 1000.
    """
    require_finite(x, "layer_median")
    return x.abs().flatten().median()


@metric("massive_ratio", unit="ratio", scale_invariant=True)
def massive_ratio(x: Rows) -> Float[Tensor, ""]:
    """Largest |x| over the median |x| of the same rows, >= 1.

    Raises:  MetricError: x is empty, not finite, or its median is zero.
    Source:  Sun et al. 2024, section 2.
    """
    median = layer_median(x)
    if median == 0:
        raise MetricError("massive_ratio is undefined: the median |x| is 0; drop dead dimensions.")
    return max_magnitude(x) / median


def norms(x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows"]:
    """Euclidean norm over the last axis."""
    return torch.linalg.vector_norm(x, dim=-1)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]  (torch does not say)


@metric("heaviest_norm_ratio", unit="ratio", scale_invariant=True)
def heaviest_norm_ratio(x: Rows) -> Float[Tensor, ""]:
    """Norm of the heaviest token over the median token norm of the same rows, >= 1.

    Raises:  MetricError: x is empty, not finite, or the median norm is zero.
    Source:  the ratio r of melens' ``ratio_jump`` (docs/definitions.md).
    """
    require_finite(x, "heaviest_norm_ratio")
    found = norms(x)
    median = found.median()
    if median == 0:
        raise MetricError("heaviest_norm_ratio is undefined: the median token norm is 0.")
    return found.max() / median
