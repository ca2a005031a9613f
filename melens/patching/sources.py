"""The values that are put in: another run's, the site's mean, or another sequence's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from melens.batches import Batch
from melens.capture import stream
from melens.errors import CaptureError, PromptError
from melens.models.anatomy import resid_pre
from melens.patching.sites import Place
from melens.shapes import TokenMask

Values = Mapping[Place, Tensor]
"""Place -> ``[batch, pos, d]`` or ``[batch, pos, head, d]``: what is written there."""


@dataclass
class Whole:
    """Reducer: one batch's tensor as it is."""

    kept: Tensor | None = None

    def update(self, x: Tensor, batch: Batch) -> None:
        """Keep the tensor of the one batch there is."""
        self.kept = x.detach().clone()

    def result(self) -> Tensor:
        """The kept tensor."""
        if self.kept is None:
            raise CaptureError("Whole saw no batch; pass it to stream() first.")
        return self.kept


def values_of(model: Any, batch: Batch, places: Sequence[Place]) -> dict[Place, Tensor]:
    """Every place's value in a run over ``batch``; one forward pass."""
    hooks = {place.hook for place in places}
    hooks |= {resid_pre(place.layer) for place in places if place.middle}
    taps = {hook: Whole() for hook in sorted(hooks)}
    stream(model, batch, taps)
    made = {}
    for place in places:
        made[place] = place.view(taps[place.hook].result())
        if place.middle:
            made[place] = made[place] + taps[resid_pre(place.layer)].result()
    return made


def mean_values(values: Values, mask: TokenMask) -> dict[Place, Tensor]:
    """Every token's value replaced by the mean over real tokens and sequences, per channel."""

    def mean(x: Tensor) -> Tensor:
        return x[mask.to(x.device)].float().mean(0).to(x.dtype).expand_as(x)

    return {place: mean(x) for place, x in values.items()}


def resampled_values(values: Values, batch: Batch, *, seed: int) -> dict[Place, Tensor]:
    """Every sequence's values replaced by those of another one, at the same positions.

    Raises:  PromptError: fewer than two sequences, or sequences of different lengths.
    """
    rows = len(batch)
    if rows < 2:
        raise PromptError(
            "resample ablation takes another sequence's activations and got 1 sequence; give at "
            "least 2, or use mode='mean'."
        )
    if not (batch.mask == batch.mask[:1]).all():
        raise PromptError(
            "resample ablation needs sequences of one length: padding has no activation to lend."
        )
    order = other_rows(rows, seed=seed)
    return {place: x[order.to(x.device)] for place, x in values.items()}


def other_rows(rows: int, *, seed: int) -> Tensor:
    """A seeded permutation of the rows without fixed points: one random cycle through all."""
    cycle = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    order = torch.empty_like(cycle)
    order[cycle] = cycle.roll(-1)
    return order


def written(values: Values, stream_at: Callable[[int], Tensor]) -> dict[Place, Tensor]:
    """What to write at each place so that it holds its value.

    The stream after attention cannot be set directly: attention is made to write what is missing.
    """

    def write(place: Place, x: Tensor) -> Tensor:
        if not place.middle:
            return x
        return (x.float() - stream_at(place.layer).float()).to(x.dtype)

    return {place: write(place, x) for place, x in values.items()}


def write_into(view: Tensor, value: Tensor, columns: Tensor, head: int | None) -> None:
    """Put ``value`` into ``view`` in place, both ``[batch, columns, (head,) d]``."""
    if head is None:
        view.index_copy_(1, columns, value)
    else:
        view[:, :, head].index_copy_(1, columns, value[:, :, head])
