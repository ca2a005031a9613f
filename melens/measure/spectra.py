"""The reducer of rank collapse: spectra of one site, with and without the massive rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor

from melens.batches import Batch
from melens.errors import CaptureError
from melens.metrics.spectrum import SPECTRAL
from melens.models.attention import View

VARIANTS = ("with", "with_centred", "without", "without_centred")
"""All rows or all but the massive ones; as they are or less their mean row."""
NOTHING_LEFT = 1e-12
"""Rows that keep less than this of their energy when centred are equal: nothing is defined."""


@dataclass
class Spectra:
    """Reducer: per head, the mean over sequences of every spectral definition.

    Keeps one sum a head, definition and variant. Each sequence's second moments are formed in
    float64 and their eigenvalues, the squared singular values, are all that is used.
    """

    view: View
    heavy: Sequence[Tensor]
    """[batch, pos] marks of massive rows, batch by batch in the order they come."""
    pool: ThreadPoolExecutor
    sums: Tensor | None = None
    """[variant, definition, head], and how many sequences each sum holds in ``counts``."""
    counts: Tensor | None = None
    seen: int = field(default=0)

    def update(self, x: Tensor, batch: Batch) -> None:
        """Take in one batch of the site's activations."""
        heavy = self.heavy[self.seen]
        self.seen += 1
        exact = x.detach().cpu() if x.device.type == "mps" else x.detach()
        mask, heavy = batch.mask.to(exact.device), heavy.to(exact.device)
        rows = self.view.by_head(exact).double() * mask[:, None, :, None]
        kept = [mask, mask & ~heavy] if heavy.any() else [mask]
        s = self._singular_values(torch.stack([m for keep in kept for m in _moments(rows, keep)]))
        found = torch.stack([define(s) for define in SPECTRAL.values()], dim=1)
        found = torch.cat([found] * (2 // len(kept)))  # nothing massive: without is with
        found = rearrange(found, "variant definition batch head -> batch variant definition head")
        defined = found.isfinite()
        sums = reduce(found.where(defined, 0.0), "batch ... -> ...", "sum").cpu()
        counts = reduce(defined.long(), "batch ... -> ...", "sum").cpu()
        self.sums = sums if self.sums is None else self.sums + sums
        self.counts = counts if self.counts is None else self.counts + counts

    def _singular_values(
        self, moments: Float[Tensor, "variant batch head n n"]
    ) -> Float[Tensor, "variant batch head n"]:
        values = self._eigenvalues(moments.flatten(0, 2)).reshape(moments.shape[:-1])
        noise = values.shape[-1] * torch.finfo(values.dtype).eps
        values = values.where(values > noise * values.amax(-1, keepdim=True), 0.0)
        energy = reduce(values, "variant batch head n -> variant batch head 1", "sum")
        whole = energy.unflatten(0, (-1, 2))[:, :1].expand(-1, 2, -1, -1, -1).flatten(0, 1)
        return values.where(energy > NOTHING_LEFT * whole, 0.0).sqrt()

    def _eigenvalues(self, flat: Float[Tensor, "group n n"]) -> Float[Tensor, "group n"]:
        if flat.device.type != "cpu":
            return torch.linalg.eigvalsh(flat)
        # LAPACK takes small matrices one after another: threads are what uses the other cores
        parts = self.pool.map(torch.linalg.eigvalsh, flat.chunk(torch.get_num_threads()))
        return torch.cat(list(parts))

    def result(self) -> Float[Tensor, "variant definition head"]:
        """Means over the sequences where a value is defined; NaN where there are none."""
        if self.sums is None or self.counts is None:
            raise CaptureError("Spectra saw no batch; pass it to stream() first.")
        return self.sums / self.counts


def _moments(
    rows: Float[Tensor, "batch head pos d"], keep: Bool[Tensor, "batch pos"]
) -> Iterator[Float[Tensor, "batch head n n"]]:
    """Second moments of the kept rows as they are, then less their mean row.

    In the smaller of token and feature space: both have the same nonzero eigenvalues.
    """
    rows = rows * keep[:, None, :, None]
    n = reduce(keep.double(), "batch pos -> batch 1 1 1", "sum").clamp_min(1)
    if rows.shape[-2] > rows.shape[-1]:
        moments = rows.mT @ rows
        total = reduce(rows, "batch head pos d -> batch head d 1", "sum")
        yield moments
        yield moments - total @ total.mT / n
        return
    gram = rows @ rows.mT
    yield gram
    both = keep[:, None, :, None] & keep[:, None, None, :]
    row = reduce(gram, "batch head i j -> batch head i 1", "sum") / n
    total = reduce(row, "batch head i 1 -> batch head 1 1", "sum") / n
    yield (gram - row - row.mT + total) * both
