"""Edits of one routed expert: all that it writes, or single entries of its down projection.

These act at every token, so they set the stored weights to zero and put the same bits back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from melens.errors import SiteError
from melens.interventions.context import watching
from melens.interventions.core import check_indices
from melens.models.experts import Experts, experts_of
from melens.protocols import HookedModel


@contextmanager
def expert_prune(model: HookedModel, layer: int, expert: int) -> Iterator[None]:
    """One expert writes nothing, at any token: its down projection and that one's bias are zero.

    The router is not touched. A token that chose the expert loses its part, and the weight of that
    part goes to no other expert. (A pruned checkpoint would let the router choose another one.)

    Raises:  SiteError: no such layer, or no experts that can be told apart. InterventionError: no
             such expert.
    Source:  "Super experts", 2025 (arXiv 2507.23279).
    """
    experts = _checked(model, layer, expert)
    bias = experts.bias(expert)
    views = [experts.down(expert), *([] if bias is None else [bias])]
    with watching(model), _zero(views):
        yield


@contextmanager
def expert_zero_weights(
    model: HookedModel, layer: int, expert: int, *, weights: Sequence[tuple[int, int]]
) -> Iterator[None]:
    """Single entries of one expert's down projection at zero, at every token.

    Args:    weights: (row = residual dimension, column = neuron).
    Raises:  as :func:`expert_prune`; InterventionError: no such row or column.
    """
    down = _checked(model, layer, expert).down(expert)
    rows = check_indices("rows", [row for row, _ in weights], down.shape[1], what="d_model")
    columns = check_indices("columns", [c for _, c in weights], len(down), what="the neurons")
    views = [down[column, row] for row, column in zip(rows, columns, strict=True)]
    with watching(model), _zero(views):
        yield


@contextmanager
def expert_ablate_neuron(
    model: HookedModel, layer: int, expert: int, *, neuron: int
) -> Iterator[None]:
    """One neuron of one expert writes nothing, at any token.

    Raises:  as :func:`expert_prune`; InterventionError: no such neuron.
    """
    down = _checked(model, layer, expert).down(expert)
    check_indices("neuron", [neuron], len(down), what=f"expert {expert}'s neurons")
    with watching(model), _zero([down[neuron]]):
        yield


def _checked(model: HookedModel, layer: int, expert: int) -> Experts:
    experts = experts_of(model, layer)
    check_indices("expert", [expert], experts.count, what=f"layer {layer}'s experts")
    if experts.down(expert).is_meta:
        raise SiteError(
            f"block {layer}'s experts are not in memory, so they cannot be edited; load the whole "
            "model with melens.load."
        )
    return experts


@contextmanager
def _zero(views: Sequence[Tensor]) -> Iterator[None]:
    """Stored weights at zero; the same bits again at the end, on errors too."""
    kept: list[Tensor] = []
    try:
        for view in views:
            kept.append(view.clone())
            with torch.no_grad():
                view.zero_()
        yield
    finally:
        # Backwards: of an entry that is named twice the first copy has the bits.
        for view, bits in reversed(list(zip(views, kept, strict=False))):
            with torch.no_grad():
                view.copy_(bits)
