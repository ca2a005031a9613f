"""Another FFN in a layer's place, for chosen tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from melens.errors import InterventionError
from melens.formatting import brief
from melens.interventions.context import Now
from melens.interventions.core import Place, blend, check_number, editing, intervention
from melens.interventions.edited import EditedTokens
from melens.interventions.tokens import Tokens
from melens.models.anatomy import norm_gain
from melens.models.ffn import ffn_input, ffn_of
from melens.results.locate import MELayer
from melens.shapes import TokenMask

PARTS = ("norm", "ffn")


@intervention(
    "transplant", neutral={"donor": 0, "strength": 0.0}, strong={"donor": 0, "parts": ("ffn",)}
)
@contextmanager
def transplant(
    model: Any,
    layer: int | MELayer,
    *,
    donor: Any,
    parts: tuple[str, ...] = PARTS,
    tokens: Tokens = None,
    strength: float = 1.0,
) -> Iterator[EditedTokens]:
    """Use the pre-FFN norm's gain and the FFN of another checkpoint, or of another layer.

    The donor's formula is computed on the chosen tokens, in float32 at least; neither model is
    written to. A norm after the FFN stays the model's own.

    Args:    donor: a hooked model of the same width (its layer of the same number is taken),
             another layer's number of this model, or both as (model, layer).
             parts: ``("norm", "ffn")`` or one of them.
             strength: 0 changes nothing, 1 is the donor's, a mixture between.
    Raises:  InterventionError: nothing to take, another width, unknown parts, or a model whose FFN
             has no norm before it (then only ``("ffn",)``). SiteError: no such layer.
    Source:  the ME-Layer authors' released code, ablation T1.
    """  # fmt: skip
    check_number("strength", strength)
    place = Place.of(model, layer, tokens)
    donor, at = _donor(model, place, donor)
    if not parts or set(parts) - set(PARTS):
        raise InterventionError(f"parts must be some of {', '.join(PARTS)}, got {brief(parts)}.")
    own, other = ffn_of(model, place.layer), ffn_of(donor, at)
    used = other if "ffn" in parts else own
    read = ffn_input(model, place.layer)
    shift = None
    if "norm" in parts:
        read = place.hook("ln2.hook_normalized")
        shift = norm_gain(donor, at, "ln2"), getattr(donor.blocks[at].ln2, "bias", None)
    seen: list[Tensor] = []

    def edit(x: Tensor, chosen: TokenMask, now: Now) -> Tensor:
        if strength == 0:
            return x[chosen]
        rows = seen[0][chosen].to(x.dtype)
        if shift is not None:
            rows = rows * shift[0].to(rows)
            rows = rows + shift[1].detach().to(rows) if isinstance(shift[1], Tensor) else rows
        made = used.written(used.product_of(rows.to(used.down.device)))
        return blend(x[chosen], made.to(x.device, x.dtype), strength)

    def keep(x: Tensor) -> None:
        seen[:] = [x]

    with editing(place, {own.output: edit}, reads={read: keep}) as edited:
        yield edited


def _donor(model: Any, place: Place, given: Any) -> tuple[Any, int]:
    pair = given if isinstance(given, tuple) and len(given) == 2 else (given, place.layer)
    if isinstance(given, int) and not isinstance(given, bool):
        pair = model, given
    donor: Any = pair[0]
    if not isinstance(pair[1], int):
        raise InterventionError(f"the donor's layer must be a number, got {brief(pair[1], 40)}.")
    if not hasattr(donor, "hook_dict"):
        raise InterventionError(
            "donor must be a hooked model, a layer's number or (model, layer), got "
            f"{type(donor).__name__}; melens.load a model first."
        )
    if donor.cfg.d_model != model.cfg.d_model:
        raise InterventionError(
            f"the donor's residual has {donor.cfg.d_model} dimensions, the model's "
            f"{model.cfg.d_model}; only equal widths fit."
        )
    return donor, pair[1]
