"""The stages of a check, in order: what each needs, what it costs, what it measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from melens.checking.bench import Bench, Tick
from melens.checking.losses import cache_norms, dose_losses, edit_losses, eviction_losses
from melens.errors import WeightsError
from melens.isolating import isolate, super_weights
from melens.locating.search import locate_in
from melens.measuring import attention, collapse, describe, sinks
from melens.models.anatomy import anatomy
from melens.models.origin import origin_of
from melens.published import known, known_by
from melens.registry import Registry
from melens.results import MELayer, Sinks
from melens.results.base import Result
from melens.results.check import Budget
from melens.settings import Run

BUDGETS: tuple[Budget, ...] = ("quick", "standard", "full")
"""From the cheapest; each holds all stages of those before it."""
MOST_LAYERS, MOST_HEADS = 3, 4
"""Of the attention view: it is a picture, and its page has to stay small."""


@dataclass(frozen=True)
class CheckStage:
    """One measurement of a check."""

    name: str
    budget: Budget
    """The least that runs it."""
    work: float
    """Expected share of time beside the others: seconds on SmolLM2-135M, two cores, 8 x 128."""
    make: Callable[[Bench, Tick], Result]
    token: bool = False
    """Whether there is nothing to measure without a block in which a token becomes massive."""

    def unneeded(self, located: MELayer) -> str | None:
        """Why this stage has nothing to do on a model; None where it has."""
        if not self.token or (located.me_layer is not None and located.me_layer >= 0):
            return None
        what = "has no massive token" if located.me_layer is None else "has it in its embedding"
        return f"the model {what}, so there is nothing to measure"


STAGES: Registry[CheckStage] = Registry("stage")


def stages_of(budget: str) -> tuple[CheckStage, ...]:
    """What a budget runs, in order.

    Raises:  UnknownNameError: no such budget.
    """
    known_budgets: Registry[int] = Registry("budget")
    for i, name in enumerate(BUDGETS):
        known_budgets.add(name, i)
    most = known_budgets[budget]
    return tuple(stage for stage in STAGES.values() if known_budgets[stage.budget] <= most)


def _add(name: str, budget: Budget, work: float, *, token: bool = False) -> Callable[..., None]:
    def register(make: Callable[[Bench, Tick], Result]) -> None:
        STAGES.add(name, CheckStage(name, budget, work, make, token))

    return register


@_add("locate", "quick", 4.0)
def _locate(bench: Bench, tick: Tick) -> Result:
    found = locate_in(bench.inputs, progress=tick)
    if not any(row.max for row in found.profile):
        raise WeightsError("every activation is 0: these weights are zero, or damaged.")
    return found


@_add("known", "quick", 0.1)
def _known(bench: Bench, tick: Tick) -> Result:
    names = (bench.located.run.model, *origin_of(bench.model).also)
    width = bench.model.cfg.d_model
    return known_by(names, lambda name: known(name, bench.located, d_model=width))


@_add("describe", "quick", 2.0)
def _describe(bench: Bench, tick: Tick) -> Result:
    return describe(bench.inputs, bench.located, progress=tick)


@_add("collapse", "quick", 17.0)
def _collapse(bench: Bench, tick: Tick) -> Result:
    return collapse(bench.inputs, bench.located, progress=tick)


@_add("sinks", "quick", 8.0)
def _sinks(bench: Bench, tick: Tick) -> Result:
    return sinks(bench.inputs, bench.located, progress=tick)


@_add("cache_norms", "quick", 8.0, token=True)
def _cache_norms(bench: Bench, tick: Tick) -> Result:
    return cache_norms(bench.inputs, bench.located, progress=tick)


@_add("attention", "quick", 2.0)
def _attention(bench: Bench, tick: Tick) -> Result:
    layers, heads = telling_heads(bench)
    return attention(bench.first, bench.located, layers=layers, heads=heads)


@_add("isolate", "standard", 130.0, token=True)
def _isolate(bench: Bench, tick: Tick) -> Result:
    return isolate(bench.short, bench.located, run=Run(progress=tick))


@_add("super_weights", "standard", 40.0)
def _super_weights(bench: Bench, tick: Tick) -> Result:
    return super_weights(bench.short, me_layer=bench.located, progress=tick)


@_add("edits", "standard", 16.0, token=True)
def _edits(bench: Bench, tick: Tick) -> Result:
    return edit_losses(bench, tick)


@_add("eviction", "standard", 6.0, token=True)
def _eviction(bench: Bench, tick: Tick) -> Result:
    return eviction_losses(bench, tick)


@_add("dose", "full", 50.0, token=True)
def _dose(bench: Bench, tick: Tick) -> Result:
    return dose_losses(bench, tick)


def telling_heads(bench: Bench) -> tuple[list[int], list[int]]:
    """Layers and heads worth looking at: around the emergence, and where sinks are strongest.

    Heads are those that draw most to the first token over these layers, and the one that draws
    least; without measured sinks the first ones.
    """
    able = anatomy(bench.model).attention_layers
    found = bench.results.get("sinks")
    start = bench.located.me_layer
    wanted = [max(start, 0)] if start is not None else []
    if isinstance(found, Sinks):
        drawn = [(found.attention_to_token[layer] or 0.0, layer) for layer in able]
        wanted += [layer for layer in (found.onset_layer, max(drawn)[1]) if layer is not None]
    layers = sorted({layer for layer in wanted if layer in able})[:MOST_LAYERS] or list(able[:1])
    every = list(range(bench.model.cfg.n_heads))
    if not isinstance(found, Sinks):
        return layers, every[:MOST_HEADS]
    drawn = dict.fromkeys(every, 0.0)
    for row in found.heads:
        if row.layer in layers:
            drawn[row.head] += row.alpha
    order = sorted(every, key=lambda head: -drawn[head])
    return layers, sorted({*order[: MOST_HEADS - 1], order[-1]})
