"""Where each layer's FFN spikes, and which weight makes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from melens.batches import Batch
from melens.capture import Reducer
from melens.errors import CaptureError
from melens.models.anatomy import resid_pre
from melens.models.ffn import FFN
from melens.results.super_weights import Site
from melens.shapes import Resid, TokenMask


class DownEntry(NamedTuple):
    """One entry of a down projection; ``expert`` is None for a dense FFN."""

    layer: int
    row: int
    column: int
    expert: int | None = None


SpikeAt = tuple[int, int, int]
"""Sequence of the batch, column of ids, residual dimension."""


class SpikeWeight(NamedTuple):
    """The weight that makes most of a spike."""

    column: int
    product: float
    """What the down projection reads there."""
    made: float
    """What the weight adds to the output, a router's weight included."""
    expert: int | None = None
    router: float | None = None


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
    expert: int | None = None
    router_weight: float | None = None


@dataclass(frozen=True)
class Seen:
    """What one pass saw of one layer: largest |x| and median |x| by site, and its spikes."""

    largest: Mapping[str, float]
    medians: Mapping[str, float]
    spikes: Mapping[Site, Spike]


class LayerTap(ABC):
    """One layer's sites read together. Memory: one layer's activations of one batch, then numbers.

    Args:    sites: name -> hook, of what is read.
             removed: entries that are edited away; they cannot be found again.
             medians: also take medians, which cost more than the rest; only the unedited run needs
             them.
    """

    def __init__(
        self, sites: Mapping[str, str], removed: Collection[DownEntry], *, medians: bool
    ) -> None:
        self.sites, self.removed, self.with_medians = sites, removed, medians
        self.rows_done = 0
        self._held: dict[str, Tensor] = {}
        self._largest: dict[str, float] = {}
        self._medians: dict[str, list[float]] = {}
        self._spikes: dict[Site, Spike] = {}

    @property
    def taps(self) -> dict[str, Reducer]:
        """Hook -> reducer."""
        return {hook: TapSite(self, name) for name, hook in self.sites.items()}

    def take(self, name: str, x: Tensor, batch: Batch) -> None:
        """One site of one batch; the last one to come sets off the reading."""
        self._held[name] = x.detach()
        if len(self._held) < len(self.sites):
            return
        held, self._held = self._held, {}
        self._look(held, batch)
        self.rows_done += len(batch)

    def result(self) -> Seen:
        """Of all batches.

        Raises:  CaptureError: before the first batch.
        """
        if not self.rows_done:
            raise CaptureError(
                f"{type(self).__name__} saw no batch; pass its taps to stream() first."
            )
        medians = {site: sum(values) / len(values) for site, values in self._medians.items()}
        return Seen(dict(self._largest), medians, dict(self._spikes))

    @abstractmethod
    def _look(self, held: Mapping[str, Tensor], batch: Batch) -> None:
        """Note the sizes of one batch, and the spikes that are larger than ever."""

    def _spike(
        self, weight: SpikeWeight, held: Mapping[str, Tensor], batch: Batch, at: SpikeAt
    ) -> Spike:
        """What is noted of a spike, and of the weight that makes most of it."""
        sequence, index, row = at
        output = float(held["output"][at])
        return Spike(
            sequence=self.rows_done + sequence,
            position=int(batch.positions[sequence, index]),
            token_id=int(batch.ids[sequence, index]),
            row=row,
            column=weight.column,
            product=weight.product,
            output=output,
            write=float(held["write"][at]) if "write" in held else None,
            share=weight.made / output if output else 0.0,
            residual=float(held["residual"][at]),
            expert=weight.expert,
            router_weight=weight.router,
        )

    def _spiking(
        self, site: str, values: Float[Tensor, "b pos d"], mask: TokenMask
    ) -> tuple[int, int, int] | None:
        """Note a site's sizes; where it is largest (row, position, dimension), if larger than ever.

        Padding does not count.
        """
        size = values.float().abs().masked_fill(~mask[..., None], -1.0)
        if self.with_medians:
            self._note_medians(site, [row[real] for row, real in zip(size, mask, strict=True)])
        if not self._note_largest(site, float(size.max())):
            return None
        at = torch.unravel_index(size.argmax(), size.shape)
        return int(at[0]), int(at[1]), int(at[2])

    def _note_medians(self, site: str, sequences: list[Tensor]) -> None:
        found = self._medians.setdefault(site, [])
        found.extend(float(sizes.median()) for sizes in sequences)

    def _note_largest(self, site: str, top: float) -> bool:
        """Whether it is larger than what was seen before."""
        fresh = top > self._largest.get(site, -1.0)
        self._largest[site] = max(self._largest.get(site, -1.0), top)
        return fresh


class TapSite:
    """One site of a LayerTap, as a reducer."""

    def __init__(self, tap: LayerTap, name: str) -> None:
        self._tap, self._name = tap, name

    def update(self, x: Resid, batch: Batch) -> None:
        """Take in ``[batch, pos, width]`` activations."""
        self._tap.take(self._name, x, batch)

    def result(self) -> Seen:
        """Of the whole layer."""
        return self._tap.result()


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

    def down(self, expert: int | None) -> Float[Tensor, "d_mlp d_model"]:
        """The down projection; there is one."""
        return self.ffn.down

    @contextmanager
    def reading(self, removed: Collection[DownEntry], *, medians: bool) -> Iterator[LayerTap]:
        """A tap for one pass."""
        yield SpikeTap(self, removed, medians=medians)


class SpikeTap(LayerTap):
    """Reads a dense FFN."""

    def __init__(
        self, place: WeightPlace, removed: Collection[DownEntry], *, medians: bool
    ) -> None:
        sites = {"residual": resid_pre(place.ffn.layer), "input": place.ffn.product}
        sites["output"] = place.ffn.output
        if place.write is not None:
            sites["write"] = place.write
        super().__init__(sites, removed, medians=medians)
        self.place = place

    def _look(self, held: Mapping[str, Tensor], batch: Batch) -> None:
        for site, values in held.items():
            if site == "residual":
                continue
            at = self._spiking(site, values, batch.mask)
            if at is not None and (site == "output" or site == "write"):
                self._spikes[site] = self._read(held, batch, at)

    def _read(self, held: Mapping[str, Tensor], batch: Batch, at: SpikeAt) -> Spike:
        sequence, index, row = at
        product = held["input"][sequence, index].float()
        open_ = product.abs()
        open_[[entry.column for entry in self.removed if entry.row == row]] = -1.0
        column = int(open_.argmax())
        made = float(product[column]) * float(self.place.ffn.down[column, row])
        return self._spike(SpikeWeight(column, float(product[column]), made), held, batch, at)
