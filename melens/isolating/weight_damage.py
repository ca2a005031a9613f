"""What removing single weights costs, of dense FFNs and of routed experts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from melens.capture import evaluating
from melens.errors import ModelError, SiteError
from melens.inputs import Inputs
from melens.intervals import mean_interval
from melens.interventions import ffn_ablate_neurons, ffn_zero_weights
from melens.interventions.experts import expert_ablate_neuron, expert_zero_weights
from melens.isolating.routed_spikes import RoutedPlace, routed_place
from melens.isolating.spikes import DownEntry, WeightPlace
from melens.metrics import sequence_loss
from melens.models.anatomy import anatomy
from melens.models.experts import has_experts
from melens.models.ffn import ffn_of
from melens.placement import input_device
from melens.protocols import HookedModel

AnyPlace = WeightPlace | RoutedPlace


def places_of(model: HookedModel) -> tuple[dict[int, AnyPlace], tuple[str, ...]]:
    """Layers with an FFN of single neurons or of routed experts, and a line for those without.

    Raises:  ModelError: no layer has one.
    """
    found: dict[int, AnyPlace] = {}
    reasons: dict[int, str] = {}
    for block in anatomy(model).blocks:
        try:
            found[block.layer] = _place(model, block.layer)
        except SiteError as error:
            reasons[block.layer] = str(error)
    if not found:
        raise ModelError(
            "no layer of this model has an FFN with neurons or experts that can be told apart, so "
            "it has no super weights to look for; melens.locate works on it."
        )
    shared = [
        str(layer)
        for layer, place in found.items()
        if isinstance(place, RoutedPlace) and place.experts.has_others
    ]
    said = [f"layer {layer}: {reason}" for layer, reason in reasons.items()]
    if shared:
        said.append(f"layer {', '.join(shared)}: the shared experts beside the routed ones")
    return found, tuple(said)


def _place(model: HookedModel, layer: int) -> AnyPlace:
    """A layer's neurons, or its experts; what is wrong with the experts, if it has any."""
    try:
        ffn = ffn_of(model, layer)
    except SiteError:
        if not has_experts(model, layer):
            raise
        return routed_place(model, layer)
    block = anatomy(model).blocks[layer]
    return WeightPlace(ffn, block.ffn_write if "ln2_post" in block.norms else None)


CONTROL_POOL = 32
"""A control is drawn from this many entries of the nearest size: few enough to stay near it."""
Tick = Callable[[int], None]


@dataclass(frozen=True)
class Damage:
    """Mean loss under one edit, and its paired difference to the unedited run."""

    without: float
    delta: float
    interval: tuple[float, float] | None


@contextmanager
def removed(model: HookedModel, weights: Sequence[DownEntry]) -> Iterator[None]:
    """All these weights at zero, at every token; afterwards the weights are as they were."""
    by_matrix: dict[tuple[int, int | None], list[tuple[int, int]]] = defaultdict(list)
    for layer, row, column, expert in weights:
        by_matrix[layer, expert].append((row, column))
    with ExitStack() as stack:
        for (layer, expert), pairs in by_matrix.items():
            if expert is None:
                edit = ffn_zero_weights(model, layer, weights=pairs, tokens="all")
            else:
                edit = expert_zero_weights(model, layer, expert, weights=pairs)
            stack.enter_context(edit)
        yield


@torch.no_grad()
def losses(inputs: Inputs, tick: Tick) -> Float[Tensor, " sequence"]:
    """Every sequence's mean next-token loss (nats a token, float64); one batch's logits at once."""
    model, found = inputs.model, []
    device = input_device(model)
    for batch in inputs.batches:
        here = batch.to(device)
        options: dict[str, object] = {"attention_mask": here.mask.long()} if here.padded else {}
        if hasattr(model, "original_model"):
            options["use_cache"] = False
        with evaluating(model):
            logits = model(here.ids, return_type="logits", **options)
        found.append(sequence_loss(logits, here.ids, here.mask).double().cpu())
        tick(len(batch))
    return torch.cat(found)


class Damages:
    """Runs over the same texts with weights removed, each compared with the unedited run."""

    def __init__(self, inputs: Inputs, *, seed: int, tick: Tick) -> None:
        self.inputs, self.seed, self.tick = inputs, seed, tick
        self.clean = losses(inputs, tick)

    @property
    def base(self) -> float:
        """Mean loss with nothing removed."""
        return float(self.clean.mean())

    def of(self, weights: Sequence[DownEntry]) -> Damage:
        """Of removing these weights together."""
        return self._under(removed(self.inputs.model, weights))

    def of_neuron(self, entry: DownEntry) -> Damage:
        """Of removing a whole neuron: its whole column of the down projection, at every token."""
        model, layer, neuron = self.inputs.model, entry.layer, entry.column
        if entry.expert is not None:
            return self._under(expert_ablate_neuron(model, layer, entry.expert, neuron=neuron))
        return self._under(ffn_ablate_neurons(model, layer, neurons=[neuron], tokens="all"))

    def _under(self, edit: AbstractContextManager[object]) -> Damage:
        with edit:
            changed = losses(self.inputs, self.tick)
        apart = changed - self.clean
        return Damage(
            float(changed.mean()), float(apart.mean()), mean_interval(apart, seed=self.seed)
        )


def stand_ins(
    places: Mapping[int, AnyPlace], weights: Sequence[DownEntry], *, seed: int
) -> list[DownEntry]:
    """For every weight another of the same matrix: the nearest |value|, no shared row or column.

    One of the CONTROL_POOL nearest, drawn at random. Every expert has a matrix of its own.
    """
    rng = torch.Generator().manual_seed(seed)
    made: list[DownEntry] = []
    for entry in weights:
        size = places[entry.layer].down(entry.expert).float().abs().cpu()
        apart = (size - size[entry.column, entry.row]).abs()
        for other in (w for w in weights if _matrix(w) == _matrix(entry)):
            apart[other.column], apart[:, other.row] = torch.inf, torch.inf
        for other in (w for w in made if _matrix(w) == _matrix(entry)):
            apart[other.column, other.row] = torch.inf
        free = int(apart.isfinite().sum())
        nearest = apart.flatten().topk(max(1, min(CONTROL_POOL, free)), largest=False).indices
        pick = int(nearest[int(torch.randint(len(nearest), (), generator=rng))])
        width = size.shape[1]
        made.append(DownEntry(entry.layer, pick % width, pick // width, entry.expert))
    return made


def _matrix(entry: DownEntry) -> tuple[int, int | None]:
    return entry.layer, entry.expert


def value_of(places: Mapping[int, AnyPlace], entry: DownEntry) -> float:
    """The entry itself."""
    return float(places[entry.layer].down(entry.expert)[entry.column, entry.row])
