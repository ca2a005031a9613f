"""The reducer of rank collapse: spectra of one site, with and without the massive rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor

from melens.batches import Batch
from melens.errors import CaptureError, ModelError
from melens.measuring.eigen import EigenQueue
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
    queue: EigenQueue = field(default_factory=EigenQueue)
    """Shared between sites, so that many spectra are solved together."""
    sums: Tensor | None = None
    """[variant, definition, head], and how many sequences each sum holds in ``counts``."""
    counts: Tensor | None = None
    seen: int = 0

    def update(self, x: Tensor, batch: Batch) -> None:
        """Take in one batch of the site's activations."""
        heavy = self.heavy[self.seen]
        self.seen += 1
        exact = x.detach().cpu() if x.device.type == "mps" else x.detach()
        rows = self.view.by_head(exact).double().contiguous()
        if batch.padded:
            rows = rows.masked_fill(~batch.mask.to(rows.device)[:, None, :, None], 0.0)
        if not rows.isfinite().all():
            raise ModelError(
                f"{self.view.hook} holds NaN or Inf at real tokens; load the model with dtype "
                "float32 or bfloat16."
            )
        moments = list(_moments(rows, batch.mask.to(rows.device), heavy.to(rows.device)))
        shape = moments[0].shape[:-1]
        self.queue.submit(
            [moment.flatten(0, 1) for moment in moments],
            lambda values: self._take(torch.stack([part.reshape(shape) for part in values])),
        )

    def _take(self, values: Float[Tensor, "variant batch head n"]) -> None:
        s = _singular_values(values)
        found = torch.stack([define(s) for define in SPECTRAL.values()], dim=1)
        if len(found) < len(VARIANTS):  # nothing massive: without is with
            found = torch.cat([found, found])
        found = rearrange(found, "variant definition batch head -> batch variant definition head")
        defined = found.isfinite()
        sums = reduce(found.where(defined, 0.0), "batch ... -> ...", "sum").cpu()
        counts = reduce(defined.long(), "batch ... -> ...", "sum").cpu()
        self.sums = sums if self.sums is None else self.sums + sums
        self.counts = counts if self.counts is None else self.counts + counts

    def result(self) -> Float[Tensor, "variant definition head"]:
        """Means over the sequences where a value is defined; NaN where there are none."""
        self.queue.flush()
        if self.sums is None or self.counts is None:
            raise CaptureError("Spectra saw no batch; pass it to stream() first.")
        return self.sums / self.counts


def _singular_values(
    values: Float[Tensor, "variant batch head n"],
) -> Float[Tensor, "variant batch head n"]:
    """Roots of the eigenvalues; rounding noise is zero, and so are all of rows that are equal."""
    noise = values.shape[-1] * torch.finfo(values.dtype).eps
    values = values.where(values > noise * values.amax(-1, keepdim=True), 0.0)
    energy = reduce(values, "variant batch head n -> variant batch head 1", "sum")
    whole = energy.unflatten(0, (-1, 2))[:, :1].expand(-1, 2, -1, -1, -1).flatten(0, 1)
    return values.where(energy > NOTHING_LEFT * whole, 0.0).sqrt()


def _moments(
    rows: Float[Tensor, "batch head pos d"],
    mask: Bool[Tensor, "batch pos"],
    heavy: Bool[Tensor, "batch pos"],
) -> Iterator[Float[Tensor, "batch head n n"]]:
    """Second moments in the order of VARIANTS; only the first two where nothing is massive.

    In the smaller of token and feature space: both have the same nonzero eigenvalues. ``rows`` are
    zero at padding.
    """
    kept = [mask, mask & ~heavy] if heavy.any() else [mask]
    if rows.shape[-2] <= rows.shape[-1]:
        gram = rows @ rows.mT
        for keep in kept:
            yield from _in_token_space(gram, keep)
        return
    moment, total = rows.mT @ rows, reduce(rows, "batch head pos d -> batch head d 1", "sum")
    for keep in kept:
        if keep is not mask:
            gone = _picked(rows, heavy)
            moment = _less(moment, gone.mT)
            total = total - reduce(gone, "batch head pos d -> batch head d 1", "sum")
        yield moment
        yield _less(moment, total / _count(keep).sqrt())


def _less(
    moment: Float[Tensor, "batch head n n"], columns: Float[Tensor, "batch head n some"]
) -> Float[Tensor, "batch head n n"]:
    """Moments less those of a few columns, in one operation."""
    flat = columns.flatten(0, 1)
    return torch.baddbmm(moment.flatten(0, 1), flat, flat.mT, alpha=-1).reshape(moment.shape)


def _in_token_space(
    gram: Float[Tensor, "batch head n n"], keep: Bool[Tensor, "batch n"]
) -> Iterator[Float[Tensor, "batch head n n"]]:
    """The kept rows as they are, then less their mean: H G H with H = I - 1 1^T / n."""
    both = keep[:, None, :, None] & keep[:, None, None, :]
    gram = gram * both
    yield gram
    row = reduce(gram, "batch head i j -> batch head i 1", "sum") / _count(keep)
    total = reduce(row, "batch head i 1 -> batch head 1 1", "sum") / _count(keep)
    yield (gram - row - row.mT + total) * both


def _picked(
    rows: Float[Tensor, "batch head pos d"], heavy: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch head most d"]:
    """The massive rows alone, filled up with zeros where a sequence has fewer."""
    most = int(heavy.sum(-1).max())
    at = heavy.int().argsort(dim=-1, descending=True, stable=True)[:, :most]
    real = heavy.gather(1, at)[:, None, :, None]
    index = at[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[-1])
    return rows.gather(2, index) * real


def _count(keep: Bool[Tensor, "batch pos"]) -> Float[Tensor, "batch 1 1 1"]:
    return reduce(keep.double(), "batch pos -> batch 1 1 1", "sum").clamp_min(1)
