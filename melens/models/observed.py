"""Attention of transformers' own models, computed where it can be read and edited.

transformers lets a program register an implementation of attention by name. This one is eager
attention with hook points between its steps; learned sinks take their share of every row, so that a
row's real tokens sum to less than 1.
"""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from typing import Protocol

import torch
from einops import repeat
from torch import Tensor, nn

NAME = "melens_observed"


class Seat(Protocol):
    """Who is shown the tensors of one attention module, and may give back others."""

    def show(self, site: str, x: Tensor) -> Tensor:
        """One step of the computation."""
        ...


SEATS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Seat]] = weakref.WeakKeyDictionary()
"""Weak on both sides: who sits at a module holds it, and would keep it for ever."""
CALLED: ContextVar[dict[nn.Module, list[bool]] | None] = ContextVar("CALLED", default=None)
"""Where every call of this implementation is noted by its module: with a learned sink or not."""


def register() -> None:
    """Make the implementation known to transformers; twice does no harm."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(NAME, observed_attention)
    AttentionMaskInterface.register(NAME, eager_mask)


def observed_attention(  # noqa: PLR0913 (transformers calls it so)
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **options: object,
) -> tuple[Tensor, Tensor]:
    """softmax(q k' / sqrt(d) + mask) v, of ``[batch, head, pos, d]`` to ``[batch, pos, head, d]``.

    Returns: what was mixed, and the weights ``[batch, head, query, key]``.
    """
    seat = SEATS[module]() if module in SEATS else None
    show = _unseen if seat is None else seat.show
    query, key, value = show("rot_q", query), show("rot_k", key), show("v", value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    keys, values = _like_queries(key, query), _like_queries(value, query)
    scores = query @ keys.transpose(-1, -2) * scale
    scores = scores if position_bias is None else scores + position_bias
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    scores = show("attn_scores", scores + _mask(attention_mask, scores))
    given = (s_aux, options.get("sinks"), getattr(module, "sinks", None))
    sinks = next((sink for sink in given if isinstance(sink, Tensor)), None)
    if (called := CALLED.get()) is not None:
        called.setdefault(module, []).append(sinks is not None)
    pattern = show("pattern", _rows(scores, sinks).to(query.dtype))
    kept = nn.functional.dropout(pattern, p=dropout, training=module.training)
    return show("z", (kept @ values).transpose(1, 2).contiguous()), pattern


def _rows(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Attention weights; a learned sink takes part in the softmax and is then left out."""
    if sinks is None:
        return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    last = sinks.reshape(1, -1, 1, 1) if sinks.ndim == 1 else sinks
    last = last.expand(*scores.shape[:-1], 1).to(scores.dtype)
    whole = torch.cat([scores, last], dim=-1)
    return whole.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))[..., :-1]


def _mask(mask: Tensor | None, scores: Tensor) -> Tensor:
    """What is added to the scores; without a mask a query sees what is not after it."""
    queries, keys = scores.shape[-2:]
    if mask is None:
        seen = torch.ones(queries, keys, dtype=torch.bool, device=scores.device)
        mask = seen.tril(keys - queries)
    mask = mask[..., :keys]
    if mask.dtype != torch.bool:
        return mask.to(scores.dtype)
    return torch.zeros_like(mask, dtype=scores.dtype).masked_fill(
        ~mask, torch.finfo(scores.dtype).min
    )


def _like_queries(x: Tensor, query: Tensor) -> Tensor:
    """Key-value heads, each as often as its queries have heads."""
    copies = query.shape[1] // x.shape[1]
    return x if copies == 1 else repeat(x, "row head pos d -> row (head copy) pos d", copy=copies)


def _unseen(site: str, x: Tensor) -> Tensor:
    return x
