"""Where each layer's FFN spikes, and what removing single weights costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from melens.batches import Batch
from melens.capture import Reducer, evaluating
from melens.errors import CaptureError, ModelError, SiteError
from melens.inputs import Inputs
from melens.intervals import mean_interval
from melens.interventions import ffn_ablate_neurons, ffn_zero_weights
from melens.metrics import sequence_loss
from melens.models.anatomy import anatomy, resid_pre
from melens.models.ffn import FFN, ffn_of
from melens.protocols import HookedModel
from melens.results.super_weights import Site
from melens.shapes import Resid, TokenMask


@dataclass(frozen=True)
class WeightPlace:
    """One layer whose neurons can be told apart."""

    ffn: FFN
    write: str | None
    """Hook behind the norm that follows the FFN; None where no norm does."""

    @property
    def site(self) -> Site:
        """Where this layer's spike meets the residual."""
        return "output" if self.write is None else "write"


@dataclass(frozen=True)
class Spike:
    """The token at which a site is largest, and the weight that should have made it so."""

    sequence: int
    position: int
    token_id: int
    row: int
    column: int
    product: float
    output: float
    """Before any norm."""
    write: float | None
    share: float
    residual: float
    """The coordinate as it enters the block."""


@dataclass(frozen=True)
class Seen:
    """What one pass saw of one layer: largest |x| and median |x| by site, and its spikes."""

    largest: Mapping[str, float]
    medians: Mapping[str, float]
    spikes: Mapping[Site, Spike]


def places_of(model: HookedModel) -> tuple[dict[int, WeightPlace], tuple[str, ...]]:
    """Layers with an FFN of single neurons, and a line for those without.

    Raises:  ModelError: no layer has one.
    """
    found, reasons = {}, {}
    for block in anatomy(model).blocks:
        try:
            ffn = ffn_of(model, block.layer)
        except SiteError as error:
            reasons[block.layer] = str(error)
            continue
        found[block.layer] = WeightPlace(
            ffn, block.ffn_write if "ln2_post" in block.norms else None
        )
    if not found:
        raise ModelError(
            "no layer of this model has an FFN with neurons of its own (a Mixture of Experts, or "
            "none), so it has no super weights to look for; melens.locate works on it."
        )
    return found, tuple(f"layer {layer}: {reason}" for layer, reason in reasons.items())


class SpikeTap:
    """One layer's sites read together. Memory: one layer's activations of one batch, then numbers.

    Args:    removed: (row, column) of weights that are edited away; they cannot be found again.
             medians: also take medians, which cost more than the rest; only the unedited run needs
             them.
    """

    def __init__(self, place: WeightPlace, removed: Collection[tuple[int, int]], *, medians: bool):
        self.place, self.removed, self.with_medians = place, removed, medians
        self.rows_done = 0
        self._held: dict[str, Tensor] = {}
        self._largest: dict[str, float] = {}
        self._medians: dict[str, list[float]] = {}
        self._spikes: dict[Site, Spike] = {}

    @property
    def taps(self) -> dict[str, Reducer]:
        """Hook -> reducer."""
        sites = {"residual": resid_pre(self.place.ffn.layer), "input": self.place.ffn.product}
        sites["output"] = self.place.ffn.output
        if self.place.write is not None:
            sites["write"] = self.place.write
        return {hook: _Part(self, name, len(sites)) for name, hook in sites.items()}

    def take(self, name: str, x: Tensor, batch: Batch, parts: int) -> None:
        """One site of one batch; the last one to come sets off the reading."""
        self._held[name] = x.detach()
        if len(self._held) < parts:
            return
        held, self._held = self._held, {}
        for site, values in held.items():
            if site == "residual":
                continue
            size = values.float().abs().masked_fill(~batch.mask[..., None], -1.0)
            top = float(size.max())
            fresh = top > self._largest.get(site, -1.0)
            self._largest[site] = max(self._largest.get(site, -1.0), top)
            if self.with_medians:
                self._take_medians(site, size, batch.mask)
            if fresh and (site == "output" or site == "write"):
                at = torch.unravel_index(size.argmax(), size.shape)
                self._spikes[site] = self._read(held, batch, (int(at[0]), int(at[1]), int(at[2])))
        self.rows_done += len(batch)

    def result(self) -> Seen:
        """Of all batches.

        Raises:  CaptureError: before the first batch.
        """
        if not self.rows_done:
            raise CaptureError("SpikeTap saw no batch; pass its taps to stream() first.")
        medians = {site: sum(values) / len(values) for site, values in self._medians.items()}
        return Seen(dict(self._largest), medians, dict(self._spikes))

    def _take_medians(self, site: str, size: Float[Tensor, "b pos d"], mask: TokenMask) -> None:
        rows = zip(size, mask, strict=True)
        found = self._medians.setdefault(site, [])
        found.extend(float(row[real].median()) for row, real in rows)

    def _read(self, held: Mapping[str, Tensor], batch: Batch, at: tuple[int, int, int]) -> Spike:
        sequence, index, row = at
        product = held["input"][sequence, index].float()
        open_ = product.abs()
        open_[[column for gone, column in self.removed if gone == row]] = -1.0
        column = int(open_.argmax())
        output = float(held["output"][at])
        made = float(product[column]) * float(self.place.ffn.down[column, row])
        return Spike(
            sequence=self.rows_done + sequence,
            position=int(batch.positions[sequence, index]),
            token_id=int(batch.ids[sequence, index]),
            row=row,
            column=column,
            product=float(product[column]),
            output=output,
            write=float(held["write"][at]) if "write" in held else None,
            share=made / output if output else 0.0,
            residual=float(held["residual"][at]),
        )


class _Part:
    """One site of a SpikeTap, as a reducer."""

    def __init__(self, tap: SpikeTap, name: str, parts: int) -> None:
        self._tap, self._name, self._parts = tap, name, parts

    def update(self, x: Resid, batch: Batch) -> None:
        """Take in ``[batch, pos, width]`` activations."""
        self._tap.take(self._name, x, batch, self._parts)

    def result(self) -> Seen:
        """Of the whole layer."""
        return self._tap.result()


At = tuple[int, int, int]
"""(layer, row, column) of a down projection."""
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
def removed(model: HookedModel, weights: Sequence[At]) -> Iterator[None]:
    """All these weights at zero, at every token; the model's own weights stay as they are."""
    by_layer: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for layer, row, column in weights:
        by_layer[layer].append((row, column))
    with ExitStack() as stack:
        for layer, pairs in by_layer.items():
            stack.enter_context(ffn_zero_weights(model, layer, weights=pairs, tokens="all"))
        yield


@torch.no_grad()
def losses(inputs: Inputs, tick: Tick) -> Float[Tensor, " sequence"]:
    """Every sequence's mean next-token loss (nats a token, float64); one batch's logits at once."""
    model, found = inputs.model, []
    device = next(model.parameters()).device
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
    """Runs over the same texts with weights removed, each held against the unedited run."""

    def __init__(self, inputs: Inputs, *, seed: int, tick: Tick) -> None:
        self.inputs, self.seed, self.tick = inputs, seed, tick
        self.clean = losses(inputs, tick)

    @property
    def base(self) -> float:
        """Mean loss with nothing removed."""
        return float(self.clean.mean())

    def of(self, weights: Sequence[At]) -> Damage:
        """Of removing these weights together."""
        return self._under(removed(self.inputs.model, weights))

    def of_neuron(self, layer: int, neuron: int) -> Damage:
        """Of removing a whole neuron: its whole column of the down projection, at every token."""
        return self._under(
            ffn_ablate_neurons(self.inputs.model, layer, neurons=[neuron], tokens="all")
        )

    def _under(self, edit: AbstractContextManager[object]) -> Damage:
        with edit:
            changed = losses(self.inputs, self.tick)
        apart = changed - self.clean
        return Damage(
            float(changed.mean()), float(apart.mean()), mean_interval(apart, seed=self.seed)
        )


def stand_ins(places: Mapping[int, WeightPlace], weights: Sequence[At], *, seed: int) -> list[At]:
    """For every weight another of the same matrix: the nearest |value|, no shared row or column.

    One of the CONTROL_POOL nearest, drawn at random.
    """
    rng = torch.Generator().manual_seed(seed)
    made: list[At] = []
    for layer, row, column in weights:
        size = places[layer].ffn.down.float().abs().cpu()
        apart = (size - size[column, row]).abs()
        for other, r, c in weights:
            if other == layer:
                apart[c], apart[:, r] = torch.inf, torch.inf
        for other, r, c in made:
            if other == layer:
                apart[c, r] = torch.inf
        free = int(apart.isfinite().sum())
        nearest = apart.flatten().topk(max(1, min(CONTROL_POOL, free)), largest=False).indices
        pick = int(nearest[int(torch.randint(len(nearest), (), generator=rng))])
        made.append((layer, pick % size.shape[1], pick // size.shape[1]))
    return made


def value_of(places: Mapping[int, WeightPlace], at: At) -> float:
    """The entry itself."""
    layer, row, column = at
    return float(places[layer].ffn.down[column, row])
