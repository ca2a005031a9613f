"""Where a layer's routed experts spike, and which weight of which expert makes it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from melens.batches import Batch
from melens.isolating.spikes import DownEntry, LayerTap, Spike, SpikeAt, SpikeWeight
from melens.models.anatomy import anatomy, resid_post, resid_pre
from melens.models.experts import Experts, Routed, experts_of
from melens.models.ffn import ffn_output
from melens.protocols import Args, HookedModel, Kwargs
from melens.results.super_weights import Site

TRIED = 8
"""Random FFN inputs on which the experts' weights must explain what they write."""


@dataclass(frozen=True)
class RoutedPlace:
    """One layer whose experts can be told apart."""

    experts: Experts
    write: str | None
    """Hook behind the norm that follows the FFN; None where no norm does."""
    whole: str | None
    """Hook of all that this norm reads, shared experts included."""

    @property
    def site(self) -> Site:
        """Where this layer's spike meets the residual."""
        return "output" if self.write is None else "write"

    def down(self, expert: int | None) -> Float[Tensor, "neuron d_model"]:
        """One expert's down projection."""
        assert expert is not None
        return self.experts.down(expert)

    @contextmanager
    def reading(self, removed: Collection[DownEntry], *, medians: bool) -> Iterator[LayerTap]:
        """A tap for one pass; it only reads what the experts' module is given and gives."""
        tap = RoutedTap(self, removed, medians=medians)
        handle = self.experts.module.register_forward_hook(tap.keep, with_kwargs=True)
        try:
            yield tap
        finally:
            handle.remove()


def routed_place(model: HookedModel, layer: int) -> RoutedPlace:
    """The routed experts of a layer, tried on random inputs.

    Raises:  SiteError: no experts, or weights that do not say what they write.
    """
    experts = experts_of(model, layer)
    down = experts.down(0)
    if down.shape[1] != model.cfg.d_model:
        raise experts.refusal(f"they write {down.shape[1]} dimensions, the residual has others")
    rows = torch.randn(TRIED, down.shape[1], generator=torch.Generator().manual_seed(0))
    experts.route(rows.to(down))
    block = anatomy(model).blocks[layer]
    if "ln2_post" not in block.norms:
        return RoutedPlace(experts, None, None)
    return RoutedPlace(experts, block.ffn_write, ffn_output(model, layer))


class RoutedTap(LayerTap):
    """Reads routed experts.

    The input is what the experts' down projections read, of the experts that a token goes to. The
    output is the experts' weighted sum. Behind a norm the share is of all that the norm reads.
    """

    def __init__(
        self, place: RoutedPlace, removed: Collection[DownEntry], *, medians: bool
    ) -> None:
        layer = place.experts.layer
        sites = {"residual": resid_pre(layer), "end": resid_post(layer)}
        if place.write is not None and place.whole is not None:
            sites |= {"write": place.write, "whole": place.whole}
        super().__init__(sites, removed, medians=medians)
        self.place, self.experts = place, place.experts
        self._calls: list[tuple[Args, Kwargs, Tensor]] = []

    def keep(self, module: nn.Module, args: Args, kwargs: Kwargs, out: Tensor) -> None:
        """Remember one call of the experts; a copy, as the FFN may add shared experts in place."""
        self._calls.append((args, kwargs, out.detach().clone()))

    def _look(self, held: Mapping[str, Tensor], batch: Batch) -> None:
        if len(self._calls) != 1:
            raise self.experts.refusal(f"they ran {len(self._calls)} times in one pass")
        (args, kwargs, out), *_ = self._calls
        self._calls.clear()
        x, routed = self.experts.called(args, kwargs, batch.mask.numel())
        sites = dict(held) | {"output": out.reshape(*batch.mask.shape, -1)}
        if self.with_medians:
            self._note_products(x, routed, batch)
        names: tuple[Site, ...] = ("output", "write") if "write" in held else ("output",)
        for site in names:
            at = self._spiking(site, sites[site], batch.mask.to(out.device))
            if at is not None:
                whole = sites["output" if site == "output" else "whole"]
                token = at[0] * batch.mask.shape[1] + at[1]
                one = Routed(routed.index[token][None], routed.weight[token][None])
                self._spikes[site] = self._read(
                    (x[token][None], one), {**held, "output": whole}, batch, at
                )

    def _note_products(
        self, x: Float[Tensor, "token d_model"], routed: Routed, batch: Batch
    ) -> None:
        """Sizes of what the down projections read; needed of the unedited run only."""
        real = batch.mask.flatten().to(routed.index.device)
        sequence = torch.arange(len(batch)).repeat_interleave(batch.mask.shape[1])
        found: list[list[Tensor]] = [[] for _ in range(len(batch))]
        for expert in self.experts.used(routed):
            token = ((routed.index == expert).any(1) & real).nonzero().flatten()
            sizes = self.experts.product(x[token], expert).float().abs()
            for row in sequence[token.cpu()].unique().tolist():
                found[row].append(sizes[sequence.to(token.device)[token] == row].flatten())
        joined = [torch.cat(sizes) for sizes in found if sizes]
        self._note_medians("input", joined)
        self._note_largest("input", max((float(s.max()) for s in joined), default=0.0))

    def _read(
        self,
        token: tuple[Float[Tensor, "1 d_model"], Routed],
        held: Mapping[str, Tensor],
        batch: Batch,
        at: SpikeAt,
    ) -> Spike:
        row = at[2]
        expert, column, product, weight = self._strongest(*token, row)
        made = weight * product * float(self.experts.down(expert)[column, row])
        return self._spike(SpikeWeight(column, product, made, expert, weight), held, batch, at)

    def _strongest(
        self, x: Float[Tensor, "1 d_model"], routed: Routed, row: int
    ) -> tuple[int, int, float, float]:
        """Expert, neuron, product and router weight, the last two's |product| largest."""
        best: tuple[float, int, int, float, float] | None = None
        for expert in self.experts.used(routed):
            product = self.experts.product(x, expert)[0].float()
            weight = float(routed.weight[routed.index == expert].sum())
            size = product.abs() * abs(weight)
            gone = [e.column for e in self.removed if (e.row, e.expert) == (row, expert)]
            size[gone] = -1.0
            column = int(size.argmax())
            if best is None or float(size[column]) > best[0]:
                best = float(size[column]), expert, column, float(product[column]), weight
        if best is None:
            raise self.experts.refusal("the token with the largest output goes to none of them")
        return best[1:]
