"""Which tokens a forward pass is looking at: ids and absolute positions, cached decoding included.

A layer that decodes under a KV cache sees one token and cannot tell which; the call of the whole
model can. A torch pre-hook on it notes ids and positions before the blocks run.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from melens.errors import InterventionError
from melens.shapes import TokenIds

PASTS = ("past_key_values", "past_kv_cache", "cache_params")


@dataclass(frozen=True)
class Now:
    """The tokens that the blocks see at this moment, all ``[batch, chunk]``."""

    ids: TokenIds | None
    """None where the caller passed embeddings instead of ids."""
    positions: TokenIds
    """Absolute, counted over real tokens from 0; padding -1."""

    @property
    def real(self) -> Tensor:
        """True at real tokens."""
        return self.positions >= 0


_NOW: weakref.WeakKeyDictionary[Any, list[Now]] = weakref.WeakKeyDictionary()
_WHOLE: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""How many open edits look at whole sequences."""


def now_of(model: Any) -> Now:
    """What the forward pass that runs at this moment looks at.

    Raises:  InterventionError: blocks are being called outside any forward pass of the model.
    """
    if not _NOW.get(model):
        raise InterventionError(
            "a block of this model was called by itself, so an edit cannot know which tokens it "
            "sees; call the whole model, or resume it with melens.resume."
        )
    return _NOW[model][-1]


@contextmanager
def passing(model: Any, ids: TokenIds, positions: TokenIds) -> Iterator[None]:
    """Say what is being run while blocks are called directly."""
    stack = _NOW.setdefault(model, [])
    stack.append(Now(ids, positions))
    try:
        yield
    finally:
        stack.pop()


def reads_whole(model: Any) -> bool:
    """Whether an open edit looks at other tokens than those it edits."""
    return _WHOLE.get(model, 0) > 0


@contextmanager
def watching(model: Any, *, whole: bool = False) -> Iterator[None]:
    """Note the tokens of every forward pass of the whole model while this is open.

    Args:    whole: count as an edit that looks at whole sequences.
    """
    outer = getattr(model, "original_model", model)
    names = list(inspect.signature(outer.forward).parameters)
    stack = _NOW.setdefault(model, [])
    depth = len(stack)

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del stack[depth:]  # a pass that failed or stopped early leaves its entry behind
        stack.append(_read({**dict(zip(names, args, strict=False)), **kwargs}))

    handle = outer.register_forward_pre_hook(note, with_kwargs=True)
    _WHOLE[model] = _WHOLE.get(model, 0) + whole
    try:
        yield
    finally:
        _WHOLE[model] -= whole
        handle.remove()
        del stack[depth:]


def _read(call: dict[str, Any]) -> Now:
    """Ids and absolute positions from the arguments of one call of the model."""
    ids = next((call[k] for k in ("input_ids", "input", "tokens") if call.get(k) is not None), None)
    ids = ids if isinstance(ids, Tensor) and not ids.is_floating_point() else None
    shown = ids if ids is not None else call.get("inputs_embeds")
    if not isinstance(shown, Tensor):
        raise InterventionError(
            "an edit needs token ids or inputs_embeds as tensors; the model was called with "
            f"{', '.join(name for name, value in call.items() if value is not None)}."
        )
    rows, width = shown.shape[:2]
    past = _past(call)
    mask = call.get("attention_mask")
    if mask is None:
        start = torch.arange(past, past + width, device=shown.device)
        return Now(ids, start.expand(rows, width))
    if isinstance(mask, Tensor) and mask.ndim == 4:  # a static cache: the last query sees all keys
        mask = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] == 0
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[-1] < past + width:
        raise InterventionError(
            "an edit needs a [batch, tokens] attention_mask that covers the cached tokens too, got "
            f"{tuple(getattr(mask, 'shape', ()))} for {past} cached and {width} new tokens."
        )
    real = mask[:, : past + width].bool().expand(rows, -1)
    positions = (real.long().cumsum(-1) - 1).masked_fill(~real, -1)
    return Now(ids, positions[:, past:].to(shown.device))


def _past(call: dict[str, Any]) -> int:
    """Number of tokens that the cache holds already, padding included."""
    found = next((call[name] for name in PASTS if call.get(name) is not None), None)
    if found is None:
        return 0
    if hasattr(found, "get_seq_length"):
        return int(found.get_seq_length())
    entries = getattr(found, "entries", None)
    if entries:  # HookedTransformer's own cache
        return int(entries[0].past_keys.shape[1])
    raise InterventionError(
        f"an edit cannot read the length of a {type(found).__name__}; pass a transformers Cache."
    )
