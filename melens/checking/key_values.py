"""cache_norms(): what a massive token's keys and values look like beside the other tokens'."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from melens.batches import Batch
from melens.capture import stream
from melens.inputs import Inputs
from melens.measuring.located import Progress, settle
from melens.models.attention import View, attention_sites
from melens.results import MELayer
from melens.results.cache_norms import CacheNorms, CacheRow

KEYS = ("rot_k", "k_norm", "k")
"""Where keys can be read, the closest to what a cache keeps first."""


class _Largest:
    """Reducer: a token's largest |entry| by head, massive tokens apart from the others."""

    def __init__(self, view: View, heavy: Sequence[Tensor]) -> None:
        self.view, self.heavy, self.seen = view, heavy, 0
        self.token: list[Tensor] = []
        self.others: list[Tensor] = []

    def update(self, x: Tensor, batch: Batch) -> None:
        """Take in one batch; the marks are those of the same batch."""
        sizes = self.view.by_head(x.detach()).float().abs().amax(-1).cpu()
        heavy = self.heavy[self.seen].cpu()
        self.seen += 1
        for row, marks, real in zip(sizes, heavy, batch.mask.cpu(), strict=True):
            if marks.any() and (real & ~marks).any():
                self.token.append(row[:, marks].amax(-1))
                self.others.append(row[:, real & ~marks].median(-1).values)

    def result(self) -> CacheRow | None:
        """The head with the largest ratio; None where no text holds a massive token."""
        if not self.token:
            return None
        token = torch.stack(self.token).amax(0)
        others = torch.stack(self.others).double().mean(0)
        ratios = torch.where(others > 0, token / others.clamp_min(1e-300), torch.zeros(()).double())
        head = int(ratios.argmax())
        return CacheRow(
            layer=self.view.layer, site=self.view.site, head=head,  # type: ignore[arg-type]
            token=float(token[head]), others=float(others[head]), ratio=float(ratios[head]),
        )  # fmt: skip


def cache_norms(inputs: Inputs, me_layer: MELayer, *, progress: Progress = None) -> CacheNorms:
    """One pass over the texts; keys where the cache keeps them, and values.

    Raises:  ResultError: ``me_layer`` is of other weights.
    """
    located = settle(inputs, me_layer)
    sites = attention_sites(inputs.model)
    taps: dict[str, _Largest] = {}
    for layer in range(me_layer.n_layers):
        held = {view.site: view for view in sites.layer(layer)}
        key = next((held[site] for site in KEYS if site in held), None)
        for view in (key, held.get("v")):
            if view is not None:
                taps[view.hook] = _Largest(view, located.heavy)
    if taps:
        stream(inputs.model, inputs.batches, taps, progress=inputs.ticker(progress))
    rows = [tap.result() for tap in taps.values()]
    return CacheNorms(
        me_layer=me_layer.me_layer,
        n_layers=me_layer.n_layers,
        rows=tuple(row for row in rows if row is not None),
        missing=sites.missing,
        run=inputs.run_info(seed=me_layer.run.seed),
    )
