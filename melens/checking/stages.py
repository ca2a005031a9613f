"""What each stage of a check measures."""

from __future__ import annotations

from collections.abc import Callable

from melens.checking.bench import Bench
from melens.checking.losses import cache_norms, dose_losses, edit_losses, eviction_losses
from melens.errors import WeightsError
from melens.isolating import isolate, super_weights
from melens.locating.search import locate_in
from melens.measuring import attention, collapse, describe, sinks
from melens.models.anatomy import anatomy
from melens.models.origin import origin_of
from melens.published import known, known_by
from melens.quantising import Protect, quantise
from melens.results import Sinks, SuperWeights
from melens.results.base import Result
from melens.settings import Progress, Run

MOST_LAYERS, MOST_HEADS = 3, 4
"""Of the attention view: it is a picture, and its page has to stay small."""
MAKERS: dict[str, Callable[[Bench, Progress], Result]] = {}


def _makes(stage: str) -> Callable[[Callable[[Bench, Progress], Result]], None]:
    return lambda make: MAKERS.update({stage: make})


@_makes("locate")
def _locate(bench: Bench, tick: Progress) -> Result:
    found = locate_in(bench.inputs, progress=tick)
    if not any(row.max for row in found.profile):
        raise WeightsError("every activation is 0: these weights are zero, or damaged.")
    return found


@_makes("known")
def _known(bench: Bench, tick: Progress) -> Result:
    names = (bench.located.run.model, *origin_of(bench.model).also)
    width = bench.model.cfg.d_model
    return known_by(names, lambda name: known(name, bench.located, d_model=width))


@_makes("describe")
def _describe(bench: Bench, tick: Progress) -> Result:
    return describe(bench.inputs, bench.located, progress=tick)


@_makes("collapse")
def _collapse(bench: Bench, tick: Progress) -> Result:
    return collapse(bench.inputs, bench.located, progress=tick)


@_makes("sinks")
def _sinks(bench: Bench, tick: Progress) -> Result:
    return sinks(bench.inputs, bench.located, progress=tick)


@_makes("cache_norms")
def _cache_norms(bench: Bench, tick: Progress) -> Result:
    return cache_norms(bench.inputs, bench.located, progress=tick)


@_makes("attention")
def _attention(bench: Bench, tick: Progress) -> Result:
    layers, heads = telling_heads(bench)
    return attention(bench.first, bench.located, layers=layers, heads=heads)


@_makes("isolate")
def _isolate(bench: Bench, tick: Progress) -> Result:
    return isolate(bench.short, bench.located, run=Run(progress=tick))


@_makes("super_weights")
def _super_weights(bench: Bench, tick: Progress) -> Result:
    return super_weights(bench.short, me_layer=bench.located, progress=tick)


@_makes("quantise")
def _quantise(bench: Bench, tick: Progress) -> Result:
    """The policy's schemes; what random ones would buy takes more texts than a check has."""
    found = bench.results.get("super_weights")
    weights = found if isinstance(found, SuperWeights) else None
    kept = Protect(weights, prefix=0, seeds=())
    run = Run(progress=tick)
    return quantise(
        bench.inputs, schemes=bench.schemes, me_layer=bench.located, protect=kept, run=run
    )


@_makes("edits")
def _edits(bench: Bench, tick: Progress) -> Result:
    return edit_losses(bench, tick)


@_makes("eviction")
def _eviction(bench: Bench, tick: Progress) -> Result:
    return eviction_losses(bench, tick)


@_makes("dose")
def _dose(bench: Bench, tick: Progress) -> Result:
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
