"""From evidence to a verdict, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from melens.locating import thresholds as limits
from melens.locating.stages import Span
from melens.metrics import effective_number
from melens.results.locate import Criteria, Verdict


def shape_of(counted: Tensor, stages: Sequence[Span], peak: int) -> Verdict:
    """How a massive token emerged.

    Args:    counted: write shares from the first counted layer to the peak.
             stages: all of the token's stages, in order.
             peak: the token's peak layer.
    """
    if any(stage.erased_at is not None and stage.erased_at <= peak for stage in stages):
        return "re-emergent"
    largest = counted.max().item()
    if largest >= limits.SINGLE_SHARE and effective_number(counted) < limits.SINGLE_EFFECTIVE:
        return "single"
    steps = counted[counted >= limits.STEP_SHARE].sort(descending=True).values
    if 2 <= len(steps) <= limits.STEPS_MOST and steps.sum() >= limits.STEPS_SHARE:
        return "multi-step"
    return "gradual"


def agreement(criteria: Criteria, me_layer: int) -> float:
    """Share of the criteria with an answer that name the ME Layer."""
    answers = [answer for answer in criteria.model_dump().values() if answer is not None]
    return sum(answer == me_layer for answer in answers) / len(answers)


def stability(agreeing: int, observations: int) -> float:
    """(k + 1) / (n + 2): k of n independent observations agree (Laplace's rule of succession).

    One observation, however many texts repeat it, gives 2/3 at most.
    """
    return (agreeing + 1) / (observations + 2)
