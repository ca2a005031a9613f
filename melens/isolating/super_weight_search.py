"""super_weights(): the down-projection entries behind activation spikes, and what each is worth."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from melens.capture import stream
from melens.errors import MetricError
from melens.inputs import Inputs, Source, prepare
from melens.isolating.routed_spikes import RoutedPlace
from melens.isolating.spikes import DownEntry, Seen, Spike
from melens.isolating.weight_damage import (
    AnyPlace,
    Damages,
    places_of,
    removed,
    stand_ins,
    value_of,
)
from melens.measuring.located import check_same_model
from melens.protocols import ModelLike
from melens.results.locate import MELayer
from melens.results.reading import HoldsMELayer, located_in
from melens.results.super_weights import (
    LayerSpikes,
    Removal,
    Role,
    Site,
    SuperWeight,
    SuperWeights,
    Thresholds,
)
from melens.settings import Progress, require_seed

AGAINST_LAYERS = 3.0
"""A spike stands out among the layers, which is what the published plots show. On SmolLM2-135M the
weakest one that makes a stage of the massive activation (layer 2) reads 3.5 x, layer 1 2 x."""
AGAINST_MEDIAN = 500.0
"""Half of Sun et al.'s 1000 x the median, which is about the residual: there stages add up. On
SmolLM2-135M what makes or erases a stage reads 600 x and more, ordinary layers 20 to 360 x."""
LEAST_SHARE = 0.5
"""One weight must make most of the spike: the product is the published argument for one weight."""


@dataclass(frozen=True)
class Search:
    """How to look, and for how many."""

    most: int = 10
    """Super weights after which to stop; 1 to 6 a model were published, 10 leaves room."""
    seed: int = 0
    """Draws the control's weights and the bootstrap."""
    against_layers: float = AGAINST_LAYERS
    against_median: float = AGAINST_MEDIAN
    least_share: float = LEAST_SHARE


SEARCH = Search()


def super_weights(
    model: ModelLike,
    prompts: Source = None,
    *,
    me_layer: HoldsMELayer | None = None,
    search: Search = SEARCH,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> SuperWeights:
    """Find single weights that make an activation spike, and measure the damage of removing each.

    A pass over the texts; in every layer the token and row where the down projection's output is
    largest, and the column of the largest product there. Where both stand out and the one weight
    makes most of it, it is pruned; again, until no spike is left. Everything is undone then.

    Beyond the original: all texts count, not one prompt; input and output are read at the same
    token; a pruned weight's column does not hide the next one; layers with a norm behind the FFN
    are judged after that norm, where size before it says nothing; of routed experts the entry
    is that of the expert and neuron with the largest product times the router's weight.

    Args:    model: anything ``melens.load`` takes.
             prompts: texts, as for ``melens.locate``.
             me_layer: what ``melens.locate`` found on this model, to say what each weight does to
             the massive coordinate; None = that is left out.
             search: thresholds, the most to find, and the seed.
             progress: called with (rows done, rows known of so far); the second grows with each
             pass that turns out to be needed.
    Raises:  ModelError: no layer has neurons that can be told apart. MetricError: ``search`` that
             cannot be meant. ResultError: ``me_layer`` is of other weights. PromptError: as
             ``locate``.
    Source:  Yu et al., "The Super Weight in Large Language Models", 2024 (arXiv 2411.07191).
    """
    check_search(search)
    located = located_in(me_layer, here=False)
    inputs = prepare(model, prompts, batch_size=batch_size)
    places, missing = places_of(inputs.model)
    if located is not None:
        check_same_model(inputs, located)
    ticks = _Ticks(inputs.total, progress)
    hunt = _Hunt(inputs, places, search, ticks)
    hunt.run()
    ticks.expect(1 + 2 * len(hunt.found) + 2 * bool(hunt.found))
    damages = Damages(inputs, seed=search.seed, tick=ticks.tick)
    together, control = _groups(hunt, damages)
    return SuperWeights(
        n_layers=inputs.model.cfg.n_layers,
        super_weights=tuple(_super_weight(hunt, item, damages, located) for item in hunt.found),
        base_loss=damages.base,
        together=together,
        control=control,
        passes=hunt.passes,
        stopped="most" if len(hunt.found) == search.most else "no spike left",
        profile=hunt.profile(),
        missing=missing,
        rule=_rule(search, places),
        thresholds=Thresholds(
            against_layers=search.against_layers,
            against_median=search.against_median,
            least_share=search.least_share,
        ),
        run=inputs.run_info(seed=search.seed, most=search.most),
    )


def find_super_weights(
    model: ModelLike | Inputs, prompts: Source = None, *, search: Search = SEARCH
) -> list[DownEntry]:
    """The weights that :func:`super_weights` finds, strongest first, without what each is worth.

    Raises:  as there.
    """
    check_search(search)
    inputs = prepare(model, prompts)
    hunt = _Hunt(inputs, places_of(inputs.model)[0], search, _Ticks(inputs.total, None))
    hunt.run()
    return [item.entry for item in hunt.found]


def check_search(search: Search) -> None:
    """Refuse numbers that no search can go by.

    Raises:  MetricError: naming the setting.
    """
    if isinstance(search.most, bool) or not isinstance(search.most, int) or search.most < 1:
        raise MetricError(f"most must be a whole number of at least 1, got {search.most!r}.")
    require_seed(search.seed)
    for name in ("against_layers", "against_median", "least_share"):
        value = getattr(search, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise MetricError(f"{name} must be a number above 0, got {value!r}.")
    if search.least_share > 1:
        raise MetricError(f"least_share is a share, at most 1, got {search.least_share!r}.")


class _Ticks:
    """Counts rows over all passes, for one progress callback."""

    def __init__(self, rows: int, progress: Progress | None) -> None:
        self.rows, self.progress = rows, progress
        self.done = self.total = 0

    def expect(self, passes: int) -> None:
        """That many more passes are to come."""
        self.total += passes * self.rows

    def tick(self, rows: int) -> None:
        self.done += rows
        if self.progress is not None:
            self.progress(self.done, self.total)


@dataclass(frozen=True)
class _Found:
    layer: int
    site: Site
    spike: Spike
    found_in: int

    @property
    def entry(self) -> DownEntry:
        return DownEntry(self.layer, self.spike.row, self.spike.column, self.spike.expert)


class _Hunt:
    """Pass after pass, each without the weights that the earlier ones found."""

    def __init__(
        self, inputs: Inputs, places: Mapping[int, AnyPlace], search: Search, ticks: _Ticks
    ) -> None:
        self.inputs, self.places, self.search, self.ticks = inputs, places, search, ticks
        self.found: list[_Found] = []
        self.passes = 0
        self.clean: dict[int, Seen] = {}

    def run(self) -> None:
        """Until no spike is left, or the most asked for were found."""
        while len(self.found) < self.search.most:
            self.passes += 1
            seen = self._pass()
            self.clean = self.clean or seen
            fresh = self._candidates(seen)[: self.search.most - len(self.found)]
            if not fresh:
                return
            self.found += fresh

    def _pass(self) -> dict[int, Seen]:
        self.ticks.expect(1)
        gone, medians = [item.entry for item in self.found], not self.clean
        with ExitStack() as stack:
            taps = {
                layer: stack.enter_context(
                    place.reading([e for e in gone if e.layer == layer], medians=medians)
                )
                for layer, place in self.places.items()
            }
            hooks = {hook: part for tap in taps.values() for hook, part in tap.taps.items()}
            stack.enter_context(removed(self.inputs.model, gone))
            stream(self.inputs.model, self.inputs.batches, hooks, progress=self.ticks.tick)
        return {layer: tap.result() for layer, tap in taps.items()}

    def _candidates(self, seen: Mapping[int, Seen]) -> list[_Found]:
        """The strongest first, by how far they stand out in their own layer."""
        made = []
        for layer, place in self.places.items():
            sites: tuple[Site, ...] = ("output", "write") if place.write else ("output",)
            for site in sites:
                spike = seen[layer].spikes[site]
                if self.verdict(layer, site, spike) == "candidate":
                    made.append(_Found(layer, site, spike, self.passes))
                    break
        return sorted(made, key=self._height, reverse=True)

    def _height(self, item: _Found) -> float:
        value = item.spike.output if item.site == "output" else item.spike.write
        return abs(value or 0.0) / max(self.clean[item.layer].medians[item.site], 1e-30)

    def verdict(self, layer: int, site: Site, spike: Spike) -> str:
        """``candidate``, or the first condition that fails; measured against the unedited run."""
        search, own = self.search, self.clean[layer].medians
        tests: list[tuple[str, float, float]] = []
        if site == "write":
            tests.append(("write", abs(spike.write or 0.0), search.against_median * own["write"]))
        else:
            for name, value in (("input", spike.product), ("output", spike.output)):
                others = search.against_layers * self._others(layer, name)
                tests.append((f"{name} among layers", abs(value), others))
                tests.append((name, abs(value), search.against_median * own[name]))
        tests.append(("share", spike.share, search.least_share))
        for name, value, least in tests:
            if value < least or not value:
                return f"{name} {value:.3g} < {least:.3g}"
        return "candidate"

    def _others(self, layer: int, name: str) -> float:
        """Median over the other layers of the unedited run's largest entry; 0 without any.

        The lower one of an even number: in a model of few layers two can spike.
        """
        others = [seen.largest[name] for at, seen in self.clean.items() if at != layer]
        return statistics.median_low(others) if others else 0.0

    def profile(self) -> tuple[LayerSpikes, ...]:
        """The unedited run, layer by layer."""
        rows = []
        for layer, place in self.places.items():
            seen = self.clean[layer]
            spike = seen.spikes[place.site]
            rows.append(
                LayerSpikes(
                    layer=layer,
                    expert=spike.expert,
                    input=seen.largest["input"],
                    input_median=seen.medians["input"],
                    output=seen.largest["output"],
                    output_median=seen.medians["output"],
                    write=seen.largest.get("write"),
                    write_median=seen.medians.get("write"),
                    row=spike.row,
                    column=spike.column,
                    position=spike.position,
                    token=self.inputs.decode(spike.token_id),
                    share=spike.share,
                    verdict=self.verdict(layer, place.site, spike),
                )
            )
        return tuple(rows)


def _groups(hunt: _Hunt, damages: Damages) -> tuple[Removal | None, Removal | None]:
    """All of them removed together, and as many others."""
    found = [item.entry for item in hunt.found]
    if not found:
        return None, None
    any_expert = any(entry.expert is not None for entry in found)
    others = stand_ins(hunt.places, found, seed=hunt.search.seed)

    def made(weights: Sequence[DownEntry]) -> Removal:
        cost = damages.of(weights)
        return Removal(
            weights=tuple((e.layer, e.row, e.column) for e in weights),
            experts=tuple(e.expert for e in weights) if any_expert else (),
            values=tuple(value_of(hunt.places, at) for at in weights),
            loss_without=cost.without,
            loss_delta=cost.delta,
            interval=cost.interval,
        )

    return made(found), made(others)


def _super_weight(
    hunt: _Hunt, item: _Found, damages: Damages, me_layer: MELayer | None
) -> SuperWeight:
    spike, cost = item.spike, damages.of([item.entry])
    neuron = damages.of_neuron(item.entry)
    return SuperWeight(
        layer=item.layer,
        expert=spike.expert,
        router_weight=spike.router_weight,
        row=spike.row,
        column=spike.column,
        value=value_of(hunt.places, item.entry),
        found_in=item.found_in,
        site=item.site,
        input_spike=spike.product,
        output_spike=spike.output,
        write_spike=spike.write,
        share=spike.share,
        sequence=spike.sequence,
        position=spike.position,
        token_id=spike.token_id,
        token=hunt.inputs.decode(spike.token_id),
        residual_before=spike.residual,
        role=None if me_layer is None else _role(spike, me_layer),
        loss_without=cost.without,
        loss_delta=cost.delta,
        interval=cost.interval,
        neuron_loss_delta=neuron.delta,
        neuron_interval=neuron.interval,
    )


def _role(spike: Spike, me_layer: MELayer) -> Role:
    """Whether what the weight adds grows or shrinks the coordinate it meets, if a massive one."""
    if spike.row not in {token.dim for token in me_layer.massive}:
        return "elsewhere"
    # A norm behind the FFN scales a row's sum as a whole, so the weight's share stays what it is.
    added = spike.share * (spike.output if spike.write is None else spike.write)
    return "writes" if abs(spike.residual + added) > abs(spike.residual) else "erases"


def _rule(search: Search, places: Mapping[int, AnyPlace]) -> str:
    text = (
        f"the FFN's product and its output at one token each at least {search.against_layers:g} x "
        f"the other layers' largest (median) and {search.against_median:g} x the layer's own "
        f"median, one weight making at least {search.least_share:.0%} of the output"
    )
    if any(place.write is not None for place in places.values()):
        text += (
            f"; or, as a norm follows the FFN, the write after it at least "
            f"{search.against_median:g} x its own median, with the same share of the output"
        )
    if any(isinstance(place, RoutedPlace) for place in places.values()):
        text += (
            "; of routed experts the output is their weighted sum, and a weight's share counts the "
            "router's weight"
        )
    return text
