"""The criteria on a layer profile of maxima alone, as others publish them: no model is run.

What such a profile cannot say: which token and dimension a maximum belongs to, and what the
embedding held. The maxima are taken for one coordinate of one token that starts at 0, so layer 0
stands for the embedding too, and the norm of a typical token is that of normal entries with the
published median.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from melens.errors import ResultError
from melens.locating.assemble import massive_alone, shape_of
from melens.locating.criteria import CRITERIA, Evidence, counted_shares, spans
from melens.locating.profile import Entry, Hit, Nearest, SequenceRow
from melens.locating.thresholds import STEP_SHARE
from melens.locating.trajectory import Path
from melens.metrics import effective_number
from melens.metrics.magnitude import SUN_ABSOLUTE, SUN_RATIO
from melens.results.locate import Verdict

USED = ("sun_layer", "sun_token", "max_jump", "difference", "first_share", "write_share")
"""Criteria that a profile of maxima can answer; the others need the token's vector."""
NORMAL = 1.4826
"""Standard deviation of normal entries over their median |x|."""


@dataclass(frozen=True)
class ProfileAnswer:
    """What the criteria say of one profile. Layers count from 0, at the block output."""

    verdict: Verdict
    """``none`` where no maximum before the final layers passes Sun et al.'s rule."""
    me_layer: int | None
    main_layer: int | None
    steps: tuple[int, ...]
    """Layers that add at least a tenth of the largest |x|."""
    share: float | None
    """Of the largest |x|, what the main step adds."""
    effective_layers: float | None
    peak: float
    """Largest |x| before the final layers."""
    peak_layer: int
    criteria: dict[str, int | None]
    """Every criterion of ``USED``."""


def answer_of(
    maxima: Sequence[float],
    medians: Sequence[float],
    *,
    d_model: int,
    passing: Sequence[int] | None = None,
) -> ProfileAnswer:
    """Name the ME Layer of a published layer profile by melens' own criteria.

    Args:    maxima: largest |x| of every block's output, residual units. medians: median |x| there.
             passing: tokens that pass Sun et al.'s rule with their own median; None = not known.
    Raises:  ResultError: profiles of different lengths, of one layer, or with a value below 0.
    """
    if not 1 < len(maxima) == len(medians) or min(*maxima, *medians) < 0:
        raise ResultError(
            f"a profile needs a maximum and a median, 0 or more, for 2 layers or more, got "
            f"{len(maxima)} and {len(medians)}."
        )
    path, rows = _path(maxima), _rows(maxima, medians, d_model, passing or [0] * len(maxima))
    evidence = Evidence([[row] for row in rows], path)
    ratios = evidence.norm_ratios(path)
    peak = path.peak
    found = massive_alone(path, medians, ratios)
    answers = {name: CRITERIA[name](evidence) for name in USED}
    if passing is None:
        answers["sun_token"] = None
    if not found:
        return ProfileAnswer("none", None, None, (), None, None, maxima[peak], peak, answers)
    start, shares = counted_shares(evidence, path)
    steps = tuple(start + i for i, share in enumerate(shares.tolist()) if share >= STEP_SHARE)
    return ProfileAnswer(
        verdict=shape_of(shares, spans(path, ratios), peak),
        me_layer=answers["first_share"],
        main_layer=answers["write_share"],
        steps=steps,
        share=shares.max().item(),
        effective_layers=effective_number(shares),
        peak=maxima[peak],
        peak_layer=peak,
        criteria=answers,
    )


def _path(maxima: Sequence[float]) -> Path:
    resid = torch.tensor([0.0, *maxima], dtype=torch.float64)[:, None]
    writes = resid.diff(dim=0)
    return Path(token_id=0, position=0, resid=resid, mixer=torch.zeros_like(writes), ffn=writes)


def _rows(
    maxima: Sequence[float], medians: Sequence[float], d_model: int, passing: Sequence[int]
) -> list[SequenceRow]:
    """One row a step; the embedding, which is not published, as small as layer 0."""
    made = []
    steps = [0, *range(len(maxima))]
    for layer in steps:
        top, median = maxima[layer], medians[layer]
        norm = max(NORMAL * median * math.sqrt(d_model), 1e-30)
        hit = Hit(0, 0, 0, top)
        made.append(
            SequenceRow(
                top=Entry(0, 0, top),
                ordinary=Entry(0, 0, 0.0),
                median=median,
                token_median=median,
                median_norm=norm,
                norm_ratio=top / norm,
                sun=top > max(SUN_ABSOLUTE, SUN_RATIO * median),
                sun_own=passing[layer] > 0,
                nearest=Nearest(hit, median, top / norm, 0, 0.0, 0.0),
                hits=(),
            )
        )
    return made
