"""Take a token out of what later tokens can attend to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from melens.errors import InterventionError
from melens.formatting import brief
from melens.interventions.context import Now, now_of
from melens.interventions.core import Place, as_index, before_modules, check_number, intervention
from melens.interventions.edited import EditedTokens
from melens.interventions.same_model import require_located_here
from melens.interventions.tokens import Tokens
from melens.interventions.wemask import Layers, layers_of
from melens.models.decoder import decoder_of
from melens.results.locate import MELayer

MASK = "attention_mask"


@intervention("drop_key", neutral={"strength": 0.0}, strong={})
@contextmanager
def drop_key(
    model: Any,
    layer: int | MELayer | None = None,
    *,
    layers: Layers = "after",
    strength: float = 1.0,
    tokens: Tokens = None,
    start: int = 0,
) -> Iterator[EditedTokens]:
    """Hide the sink token's key and value from every later token; the token still sees itself.

    Args:    layer, layers, tokens: as for ``wemask``; a bridge or a plain transformers model.
             strength: attention weights to the token are multiplied by 1 - strength before they
             are normalised: 0 changes nothing, 1 removes key and value.
             start: absolute position from which on queries miss the key; those before it see it,
             as they do before a cache evicts it.
    Raises:  InterventionError: settings; flash attention, whose mask is no matrix; at the end, if
             no pass held a chosen token. Beam search is exact for tokens of the prompt only.
    """
    if not 0 <= check_number("strength", strength, low=0.0) <= 1:
        raise InterventionError(f"strength must be from 0 to 1, got {brief(strength, 40)}.")
    if (since := as_index(start)) is None or since < 0:
        raise InterventionError(f"start must be a position from 0 on, got {brief(start, 40)}.")
    decoder = decoder_of(model)
    require_located_here(decoder, layer, tokens)
    at = layers_of(decoder, layer, layers)
    place = Place.at(
        decoder.model, at[0], layer, tokens, known=at[0] - 1, blocks=decoder.blocks
    )  # fmt: skip
    hidden = _Hidden(place)
    amount = math.log1p(-strength) if strength < 1 else -math.inf

    def make(layer: int) -> Callable[..., Any]:
        def edit(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            now = now_of(decoder.model)
            columns = hidden.columns(now)
            if strength == 0 or not columns.any():
                return None
            place.edited.changed = True
            mask = kwargs.get(MASK)
            late = now.positions >= since
            made = _with_hidden(mask, columns, late, amount, _dtype(args, kwargs))
            return args, {**kwargs, MASK: made}

        return edit

    with before_modules(place, {n: decoder.attentions[n] for n in at}, make, whole=True) as edited:
        yield edited


class _Hidden:
    """Which of all keys are hidden, chunk after chunk of one text."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._now: Now | None = None
        self._columns: Tensor | None = None

    def columns(self, now: Now) -> Bool[Tensor, "batch key"]:
        """Hidden keys of a pass, cached ones included."""
        assert now.keys is not None
        if now is self._now and self._columns is not None:
            return self._columns
        marked, _ = self.place.marked(now)
        past = now.keys.shape[1] - marked.shape[1]
        before = marked.new_zeros(len(marked), past)
        if past:
            if self._columns is None or len(self._columns) != len(marked):
                raise InterventionError(
                    "cached tokens were not seen while drop_key was open; enter it before the "
                    "prompt is run."
                )
            kept = self._columns[:, :past]
            before[:, : kept.shape[1]] = kept
        self._now, self._columns = now, torch.cat([before, marked], dim=1)
        return self._columns


def _dtype(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype:
    return (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).dtype


def _with_hidden(
    mask: Any, columns: Tensor, late: Tensor, amount: float, dtype: torch.dtype
) -> Tensor:
    """The layer's mask, additive, with the hidden keys' columns lowered for late other queries."""
    total, chunk = columns.shape[1], late.shape[1]
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 4):
        raise InterventionError(
            "drop_key needs eager or sdpa attention (a mask of queries x keys); load the model "
            "with attn_implementation='eager'."
        )
    low = torch.finfo(dtype).min
    query = torch.arange(total - chunk, total, device=columns.device)
    key = torch.arange(total, device=columns.device)
    hide = columns[:, None, None, :] & (key[None] != query[:, None]) & late[:, None, :, None]
    if mask is None:
        seen = (key[None] <= query[:, None])[None, None]
        mask = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, low)
    hide, width = hide.to(mask.device), mask.shape[-1]
    if width < total:  # a sliding window's cache keeps the last keys only
        hide = hide[..., total - width :]
    hide = torch.nn.functional.pad(hide, (0, width - hide.shape[-1]))
    if mask.dtype == torch.bool:
        if _true_is_hidden(mask, min(total, width)):
            if amount > -math.inf:
                raise InterventionError(
                    "this model's attention takes a mask of yes and no, so a key cannot be hidden "
                    "in part; use strength=1 (or 0)."
                )
            return mask | hide
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, low)
    lowered = mask + amount if amount > -math.inf else torch.full_like(mask, low)
    return torch.where(hide, lowered.clamp_min(low), mask)


def _true_is_hidden(mask: Tensor, seen: int) -> bool:
    """Whether True takes a key away (MPT) or lets it be read (sdpa): the last token of a text sees
    itself, so at its own key the mask says which; padding sees nothing or everything.
    """  # noqa: D205
    own = torch.arange(seen - mask.shape[-2], seen, device=mask.device)
    queries = torch.arange(mask.shape[-2], device=mask.device)
    later = own[None] > own[:, None]
    if later.any():  # a query never sees a later key: no padding disturbs that
        return bool(mask[..., queries[:, None], own[None]][..., later].all())
    return not bool(mask[..., queries, own].any())
