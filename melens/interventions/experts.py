"""Edits of one routed expert: all that it writes, or single entries of its down projection.

These act at every token, so they set the stored weights to zero and put the same bits back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from melens.errors import SiteError
from melens.interventions.context import watching
from melens.interventions.core import check_indices
from melens.models.experts import Experts, experts_of
from melens.placement import require_whole
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
    with watching(model), _zero(experts, expert, [(slice(None), slice(None))], bias=True):
        yield


@contextmanager
def expert_zero_weights(
    model: HookedModel, layer: int, expert: int, *, weights: Sequence[tuple[int, int]]
) -> Iterator[None]:
    """Single entries of one expert's down projection at zero, at every token.

    Args:    weights: (row = residual dimension, column = neuron).
    Raises:  as :func:`expert_prune`; InterventionError: no such row or column.
    """
    experts = _checked(model, layer, expert)
    down = experts.down(expert)
    rows = check_indices("rows", [row for row, _ in weights], down.shape[1], what="d_model")
    columns = check_indices("columns", [c for _, c in weights], len(down), what="the neurons")
    places = list(zip(columns, rows, strict=True))
    with watching(model), _zero(experts, expert, places):
        yield


@contextmanager
def expert_ablate_neuron(
    model: HookedModel, layer: int, expert: int, *, neuron: int
) -> Iterator[None]:
    """One neuron of one expert writes nothing, at any token.

    Raises:  as :func:`expert_prune`; InterventionError: no such neuron.
    """
    experts = _checked(model, layer, expert)
    check_indices("neuron", [neuron], len(experts.down(expert)), what=f"expert {expert}'s neurons")
    with watching(model), _zero(experts, expert, [(neuron, slice(None))]):
        yield


def _checked(model: HookedModel, layer: int, expert: int) -> Experts:
    experts = experts_of(model, layer)
    check_indices("expert", [expert], experts.count, what=f"layer {layer}'s experts")
    require_whole(experts.module, "an edit of experts")
    if experts.down(expert).is_meta:
        raise SiteError(
            f"block {layer}'s experts are not in memory, so they cannot be edited; load the whole "
            "model with melens.load."
        )
    return experts


DownPlace = tuple[int | slice, int | slice]
"""(neuron, residual dimension) in a down projection."""


@dataclass
class _Held:
    """One expert's stored bits while edits of it are open, and which these are."""

    down: Tensor
    bias: Tensor | None
    open: list[tuple[Sequence[DownPlace], bool]] = field(default_factory=list)

    @torch.no_grad()
    def write(self, experts: Experts, expert: int) -> None:
        """The stored bits, with the places of every open edit at zero."""
        down, bias = experts.down(expert), experts.bias(expert)
        down.copy_(self.down)
        if bias is not None and self.bias is not None:
            bias.copy_(self.bias)
        for places, with_bias in self.open:
            for place in places:
                down[place] = 0.0
            if with_bias and bias is not None:
                bias.zero_()


_HELD: WeakKeyDictionary[nn.Module, dict[int, _Held]] = WeakKeyDictionary()
"""The experts' module -> expert -> its bits: edits may be left in any order."""


@contextmanager
def _zero(
    experts: Experts, expert: int, places: Sequence[DownPlace], *, bias: bool = False
) -> Iterator[None]:
    """Places of one expert at zero; the same bits again at the end, on errors too."""
    module = cast("nn.Module", experts.module)
    kept = _HELD.setdefault(module, {})
    if expert not in kept:
        stored = experts.bias(expert)
        copied = None if stored is None else stored.clone()
        kept[expert] = _Held(experts.down(expert).clone(), copied)
    held, edit = kept[expert], (places, bias)
    held.open.append(edit)
    try:
        held.write(experts, expert)
        yield
    finally:
        held.open = [other for other in held.open if other is not edit]
        held.write(experts, expert)
        if not held.open:
            del kept[expert]
