"""measure_all(): describe, collapse and sinks, one forward pass over the texts."""

from __future__ import annotations

from typing import NamedTuple

from melens.inputs import Source, prepare
from melens.measuring.attention_sinks import T_PAPER, SinkPlan, check_attention, check_t
from melens.measuring.located import run_once, settle
from melens.measuring.massive_token import FIRST_TOKENS, portray
from melens.measuring.rank_collapse import RankPlan
from melens.models.attention import attention_sites
from melens.protocols import ModelLike
from melens.results import Collapse, Sinks, TokenPortrait
from melens.results.reading import HoldsMELayer
from melens.settings import Progress


class Measurements(NamedTuple):
    """The three results; each is complete by itself."""

    describe: TokenPortrait
    collapse: Collapse
    sinks: Sinks


def measure_all(
    model: ModelLike,
    me_layer: HoldsMELayer | None = None,
    prompts: Source = None,
    *,
    t: int = T_PAPER,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Measurements:
    """:func:`describe`, :func:`collapse` and :func:`sinks` in one forward pass over the texts.

    Arguments and errors are theirs; the vocabulary sample is describe's default, with the seed the
    ME Layer was located with.
    """
    check_t(t)
    inputs = prepare(model, prompts, batch_size=batch_size)
    check_attention(inputs.model)
    located = settle(inputs, me_layer, progress=progress)
    portrait = portray(inputs, located, first_tokens=FIRST_TOKENS, seed=located.me_layer.run.seed)
    sink_plan = SinkPlan(inputs, located, t)
    rank_plan = RankPlan(inputs, located, attention_sites(inputs.model))
    run_once(inputs, rank_plan.taps, sink_plan.taps, progress=progress)
    return Measurements(portrait, rank_plan.result(), sink_plan.result())
