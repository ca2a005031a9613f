"""Which tokens a forward pass is looking at: ids and absolute positions, cached decoding included.

A layer that decodes under a KV cache sees one token and cannot tell which; the call of the whole
model can. A torch pre-hook on it notes ids and positions before the blocks run.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Int
from torch import Tensor

from melens.capture import one_thread, require_this_thread
from melens.errors import InterventionError
from melens.protocols import AnyModel, Args, Kwargs, transformers_of
from melens.shapes import Resid, TokenIds

PASTS = ("past_key_values", "past_kv_cache", "cache_params")


@dataclass(frozen=True)
class PassTokens:
    """The tokens that the blocks see at this moment, all ``[batch, chunk]``."""

    ids: TokenIds | None
    """None where the caller passed embeddings instead of ids."""
    positions: TokenIds
    """Absolute, counted over real tokens from 0; padding -1."""
    keys: Int[Tensor, "batch key"] | None = None
    """The same for all that attention can read, cached tokens first, ``[batch, past + chunk]``;
    None under continuous batching, whose cache keeps the keys of all texts in pages."""
    recorded: Callable[[int], Resid] | None = field(default=None, repr=False, compare=False)
    """Where blocks are resumed from a recorded run: what left a layer there, for these tokens."""
    notes: dict[object, Tensor] = field(default_factory=dict, repr=False, compare=False)
    """What readers keep for edits further on in the same pass."""
    again: bool = False
    """Whether a backward pass computes a block of this pass again: edited as before, not counted
    again."""

    @property
    def real(self) -> Tensor:
        """True at real tokens."""
        return self.positions >= 0


_NOW: weakref.WeakKeyDictionary[object, list[PassTokens]] = weakref.WeakKeyDictionary()
_WHOLE: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
"""How many open edits look at whole sequences."""


def pass_of(model: AnyModel) -> PassTokens:
    """What the forward pass that runs at this moment looks at.

    Raises:  InterventionError: blocks are being called outside any forward pass of the model.
    """
    require_this_thread(model)
    if not _NOW.get(model):
        raise InterventionError(
            "a block of this model was called by itself, so an edit cannot know which tokens it "
            "sees; call the whole model, or resume it with melens.resume."
        )
    return _NOW[model][-1]


@contextmanager
def passing(model: AnyModel, now: PassTokens) -> Iterator[None]:
    """Say what is being run while blocks are called directly."""
    with one_thread(model):
        stack = _NOW.setdefault(model, [])
        stack.append(now)
        try:
            yield
        finally:
            stack.pop()


@contextmanager
def recomputing(model: AnyModel, now: PassTokens) -> Iterator[None]:
    """Say which pass a block belongs to that a backward pass computes again, in whatever thread."""
    stack = _NOW.setdefault(model, [])
    stack.append(replace(now, again=True))
    try:
        yield
    finally:
        stack.pop()


def reads_whole(model: AnyModel) -> bool:
    """Whether an open edit looks at other tokens than those it edits."""
    return _WHOLE.get(model, 0) > 0


@contextmanager
def watching(model: AnyModel, *, whole: bool = False) -> Iterator[None]:
    """Note the tokens of every forward pass of the whole model while this is open.

    Open edits share one note a pass, however many they are.

    Args:    whole: count as an edit that looks at whole sequences.
    Raises:  BusyError: another thread has an edit or a capture open on the model. A pass of another
             thread while this is open is refused in that thread.
    """
    with one_thread(model):
        yield from _watching(model, whole)


def _watching(model: AnyModel, whole: bool) -> Iterator[None]:
    watch = _WATCHED.get(model)
    if watch is None:
        watch = _WATCHED[model] = _Watch(model)
    watch.users += 1
    _WHOLE[model] = _WHOLE.get(model, 0) + whole
    try:
        yield
    finally:
        # An edit kept open until its model is collected finds the model's entries gone already.
        _WHOLE[model] = _WHOLE.get(model, 0) - whole
        watch.users -= 1
        if not watch.users:
            watch.close()
            _WATCHED.pop(model, None)


def is_edited(model: AnyModel) -> bool:
    """Whether an edit of melens is open on the model."""
    return model in _WATCHED


def require_no_edit(model: AnyModel) -> None:
    """Refuse to keep results of an edited model: they would be taken for the unedited one's.

    Raises:  InterventionError: an edit is open.
    """
    if is_edited(model):
        raise InterventionError(
            "an edit is open on this model, and what is kept would be taken for the unedited "
            "model's; keep nothing (no out=, no keep=), or leave the edit first."
        )


class _Watch:
    """The one hook that notes a model's passes, and how many open edits need it."""

    def __init__(self, model: AnyModel) -> None:
        outer = transformers_of(model)
        self.bridged, key = outer is not model, weakref.ref(model)
        self.whole = lambda: (there := key()) is not None and reads_whole(there)
        self.names = list(inspect.signature(outer.forward).parameters)
        self.stack = _NOW.setdefault(model, [])
        self.depth = len(self.stack)
        self.users = 0
        self.handle = outer.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: torch.nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Before the whole model runs."""
        require_this_thread(module)
        del self.stack[self.depth :]  # a pass that failed or stopped early leaves its entry behind
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if _is_paged(call):
            _require_packable(module, bridged=self.bridged, whole=self.whole())
        self.stack.append(_read(call))

    def close(self) -> None:
        """Take the hook off."""
        self.handle.remove()
        del self.stack[self.depth :]


_WATCHED: weakref.WeakKeyDictionary[object, _Watch] = weakref.WeakKeyDictionary()


def _read(call: Kwargs) -> PassTokens:
    """Ids and absolute positions from the arguments of one call of the model."""
    ids = next((call[k] for k in ("input_ids", "input", "tokens") if call.get(k) is not None), None)
    ids = ids if isinstance(ids, Tensor) and not ids.is_floating_point() else None
    shown = ids if ids is not None else call.get("inputs_embeds")
    if not isinstance(shown, Tensor):
        raise InterventionError(
            "an edit needs token ids or inputs_embeds as tensors; the model was called with "
            f"{', '.join(name for name, value in call.items() if value is not None)}."
        )
    if _is_paged(call):
        return PassTokens(ids, _packed_positions(call))
    past = _past(call)
    keys = _key_positions(call, shown, past)
    return PassTokens(ids, keys[:, past:], keys)


def _is_paged(call: Kwargs) -> bool:
    """Whether the call is one of transformers' continuous batching."""
    return call.get("cache") is not None and call.get("cu_seq_lens_q") is not None


def _require_packable(module: torch.nn.Module, *, bridged: bool, whole: bool) -> None:
    """Refuse continuous batching where an edit could not be right there.

    Raises:  InterventionError: a bridge, whose attention reads no paged cache; an edit that
             compares a token with others, which are those of other texts too.
    """
    if bridged:
        raise InterventionError(
            f"this {type(module).__name__} is inside a bridge, whose attention cannot read the "
            "pages of continuous batching; load the folder with transformers, and give the model "
            "to melens.exporting.open_edit(folder, model)."
        )
    if whole:
        raise InterventionError(
            "an open edit (drop-key) looks at whole texts, and continuous batching puts several "
            "into one row; use wemask, or generate without continuous batching."
        )


def _packed_positions(call: Kwargs) -> Int[Tensor, "1 chunk"]:
    """Positions of the tokens of several texts in one row; a graph's padding at the end -1."""
    told = call["position_ids"]
    place = torch.arange(told.shape[-1], device=told.device)
    return told.long().masked_fill(place >= call["cu_seq_lens_q"].max(), -1)


def _key_positions(call: Kwargs, shown: Tensor, past: int) -> Int[Tensor, "batch key"]:
    """Absolute positions of all keys, cached ones first; padding -1."""
    rows, width = shown.shape[:2]
    seen, told = past + width, call.get("position_ids")
    mask = call.get("attention_mask")
    if isinstance(mask, dict):  # one a kind of layer; that of full attention shows all keys
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        if isinstance(told, Tensor) and told.ndim == 2 and not past:
            return told.expand(rows, width)  # packed texts start at 0 again
        return torch.arange(seen, device=shown.device).expand(rows, seen)
    if isinstance(mask, Tensor) and mask.ndim == 4:  # a static cache: the last query sees all keys
        mask = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] == 0
    narrow = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[-1] < seen
    if narrow and isinstance(told, Tensor):
        # Every layer has a window, and the cache dropped what is before it: count back.
        back = told[:, -1:] - torch.arange(seen - 1, -1, -1, device=told.device)
        return back.clamp_min(-1).expand(rows, seen)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or narrow:
        raise InterventionError(
            "an edit needs a [batch, tokens] attention_mask that covers the cached tokens too, got "
            f"{tuple(getattr(mask, 'shape', ()))} for {past} cached and {width} new tokens."
        )
    real = mask[:, :seen].bool().expand(rows, -1)
    return (real.long().cumsum(-1) - 1).masked_fill(~real, -1).to(shown.device)


def _past(call: Kwargs) -> int:
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
