"""Edits of the residual stream and of what a block writes into it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from melens.errors import InterventionError
from melens.formatting import brief
from melens.interventions.context import PassTokens
from melens.interventions.core import (
    EditedTokens,
    Place,
    blend,
    check_indices,
    check_number,
    editing,
    intervention,
)
from melens.interventions.target import Tokens
from melens.models.anatomy import anatomy, resid_post
from melens.protocols import HookedModel
from melens.results.locate import MELayer
from melens.shapes import TokenMask

PARTS = ("attention", "ffn")


@intervention("residual_set", neutral={"dims": [0], "strength": 0.0}, strong={"dims": [0, 5]})
@contextmanager
def residual_set(
    model: HookedModel,
    layer: int | MELayer,
    *,
    dims: Sequence[int] | None = None,
    tokens: Tokens = None,
    values: float | Sequence[float] = 0.0,
    strength: float = 1.0,
) -> Iterator[EditedTokens]:
    """Set coordinates of the residual that leaves a layer: to zero, to their mean, to anything.

    Args:    layer: a layer counted from 0, or a located ME Layer.
             dims: residual dimensions; None = the massive ones, where ``layer`` or ``tokens`` is a
             located ME Layer.
             values: one for all, or one a dimension (``melens.isolating.mean_coordinates`` takes
             Sun et al.'s empirical mean).
             strength: 0 changes nothing, 1 sets; with the value 0, 0.9 leaves a tenth.
    Raises:  SiteError, InterventionError: as every edit.
    Source:  Sun et al., "Massive Activations in Large Language Models", 2024, section 2.2.
    """
    check_number("strength", strength)
    place = Place.of(model, layer, tokens, after=True)
    found = next((x for x in (tokens, layer) if isinstance(x, MELayer)), None)
    if dims is None:
        if found is None:
            raise InterventionError("dims: name them, or pass a located ME Layer.")
        dims = sorted({token.dim for token in found.massive})
    wanted = check_indices("dims", dims, model.cfg.d_model, what="the residual's dimensions")
    several = isinstance(values, (list, tuple))
    given: list[object] = list(values) if several else [values] * len(wanted)
    if len(given) != len(wanted):
        raise InterventionError(f"values: {len(given)} were given for {len(wanted)} dims.")
    aim = torch.tensor([check_number("values", value) for value in given])

    def edit(x: Tensor, chosen: TokenMask, now: PassTokens) -> Tensor:
        rows = x[chosen]
        rows[:, wanted] = blend(rows[:, wanted], aim.to(rows).expand(len(rows), -1), strength)
        return rows

    with editing(place, {resid_post(place.layer): edit}) as edited:
        yield edited


@intervention("write_block", neutral={"part": "ffn", "factor": 1.0}, strong={"part": "attention"})
@contextmanager
def write_block(
    model: HookedModel,
    layer: int | MELayer,
    *,
    part: str,
    tokens: Tokens = None,
    factor: float = 0.0,
) -> Iterator[EditedTokens]:
    """Multiply what a block's ``attention`` or ``ffn`` writes into the residual.

    A norm on the write path comes before. 0 drops the write, 1 changes nothing.

    Raises:  InterventionError: another part, or a block without it; else as every edit.
    """
    check_number("factor", factor)
    place = Place.of(model, layer, tokens)

    def edit(x: Tensor, chosen: TokenMask, now: PassTokens) -> Tensor:
        return x[chosen] * factor

    with editing(place, dict.fromkeys(write_sites(model, place.layer, part), edit)) as edited:
        yield edited


def write_sites(model: HookedModel, layer: int, part: str) -> tuple[str, ...]:
    """Hooks through which a block's attention (or other mixer) or FFN writes."""
    if part not in PARTS:
        raise InterventionError(f"part must be {' or '.join(PARTS)}, got {brief(part, 40)}.")
    block = anatomy(model).blocks[layer]
    sites = block.mixer_writes if part == "attention" else tuple(filter(None, [block.ffn_write]))
    if not sites:
        raise InterventionError(f"block {layer} writes nothing through its {part}.")
    return sites
