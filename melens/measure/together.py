"""measure(): describe, collapse and sinks over the same tokens, at the price of one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

from melens.inputs import Source, take_in
from melens.measure.attention_sinks import T_PAPER, SinkPlan, check_t
from melens.measure.located import Progress, settle
from melens.measure.massive_token import FIRST_TOKENS, portray
from melens.measure.one_pass import run_once
from melens.measure.rank_collapse import RankPlan
from melens.models.attention import attention_sites
from melens.results import Collapse, MELayer, Sinks, TokenPortrait


class Measurements(NamedTuple):
    """The three results; each is complete by itself."""

    describe: TokenPortrait
    collapse: Collapse
    sinks: Sinks


def measure_all(
    model: Any,
    me_layer: MELayer | None = None,
    prompts: Source = None,
    *,
    t: int = T_PAPER,
    batch_size: int = 4,
    progress: Progress = None,
) -> Measurements:
    """:func:`describe`, :func:`collapse` and :func:`sinks` in one forward pass over the texts.

    Arguments and errors are theirs.
    """
    check_t(t)
    inputs = take_in(model, prompts, batch_size=batch_size)
    located = settle(inputs, me_layer, progress=progress)
    portrait = portray(inputs, located, first_tokens=FIRST_TOKENS, seed=0)
    sink_plan = SinkPlan(inputs, located, t)
    rank_plan = RankPlan(inputs, located, attention_sites(inputs.model))
    run_once(inputs, rank_plan.taps, sink_plan.taps, progress=progress)
    return Measurements(portrait, rank_plan.result(), sink_plan.result())
