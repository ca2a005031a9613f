"""What one token writes into recurrent states, and how much of later reads comes from it.

A linear-attention or state-space layer keeps a state that each token decays and adds to. The state
is linear in what it held, so one token's part is followed by running the layer beside itself: once
with the token's write in its state, once without. transformers' cache exposes the state.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, TypeGuard

import torch
from einops import rearrange
from torch import Tensor, nn

from melens.capture import evaluating, one_thread
from melens.errors import ModelError
from melens.metrics import effective_rank
from melens.placement import input_device
from melens.protocols import Args, HookedModel, KeyValueCache, Kwargs, TransformersModel

PAST = "past_key_values"
STEPS = 32
"""Later tokens that are followed, at most."""
CLOSE, HALF_CLOSE = 1e-3, 5e-2
"""Of the largest logit: token after token must give what the whole text gives."""


@dataclass
class Followed:
    """One layer's numbers for one token of one text."""

    norm: float = 0.0
    rank: float | None = None
    left: float = 0.0
    reads: list[float] = field(default_factory=list)


@dataclass
class _MixerCall:
    layer: int
    args: Args
    kwargs: Kwargs
    before: object
    """The layer's cache before the call."""
    out: Tensor | None = None


@torch.no_grad()
def follow(
    model: HookedModel, mixers: Mapping[int, nn.Module], row: Sequence[int], at: int, steps: int
) -> dict[int, Followed]:
    """Follow the token at ``at`` through every state that the model's cache exposes.

    Args:    mixers: layer -> the module that keeps a state.
             row: token ids of one text, with at least ``steps`` tokens after ``at``.
             steps: later tokens to follow, at least 1.
    Returns: by layer; a layer whose state the cache does not show is left out.
    Raises:  ModelError: the cache does not give what the whole text gives.
    """
    hf = model.original_model
    device = input_device(hf)
    ids = torch.tensor([row[: at + 1 + steps]], device=device)
    given = {"use_cache": True, _cache_name(hf): (cache := _new_cache(hf))}
    with one_thread(model), evaluating(model), _MixerCalls(mixers) as watch:
        if at > 0:
            hf(ids[:, :at], **given)
        watch.begin(with_cache=True)
        hf(ids[:, at : at + 1], **given)
        found, without = {}, {}
        for layer, call in watch.calls.items():
            started = _start(mixers[layer], call, cache.layers[layer])
            if started is not None:
                found[layer], without[layer] = started
        shown = torch.empty(0)
        for step in range(at + 1, ids.shape[1]):
            watch.begin(with_cache=False)
            shown = hf(ids[:, step : step + 1], **given).logits[:, -1].float()
            for layer, follower in found.items():
                _step(mixers[layer], watch.calls[layer], without[layer], follower)
        watch.begin(with_cache=False)
        _require_same(hf, ids, shown)
    for layer, follower in found.items():
        apart = _apart(_states(cache.layers[layer]), _states(without[layer]))
        follower.left = apart / max(follower.norm, 1e-30)
    return found


def _start(mixer: nn.Module, call: _MixerCall, after: object) -> tuple[Followed, object] | None:
    """The write itself, and the layer's cache as it were without it; None without a state."""
    real = _states(after)
    if not real:
        return None
    empty = copy.deepcopy(call.before)
    for state in _states(empty):
        state.zero_()  # a state of zeros: what the call leaves in it is the write alone
    _again(mixer, call, empty)
    writes = _states(empty)
    without = copy.deepcopy(after)
    for state, whole, write in zip(_states(without), real, writes, strict=True):
        state.copy_(whole - write)
    norm = sum(float(write.cpu().double().square().sum()) for write in writes) ** 0.5
    return Followed(norm, _rank(writes)), without


def _step(mixer: nn.Module, call: _MixerCall, without: object, follower: Followed) -> None:
    """One later token, with and without the write."""
    assert call.out is not None
    out = call.out.cpu().double()
    missing = _again(mixer, call, without).cpu().double()
    follower.reads.append(float((out - missing).norm() / out.norm().clamp_min(1e-30)))


def _again(mixer: nn.Module, call: _MixerCall, layer_cache: Any) -> Tensor:
    """The same call with another cache of this layer, which it fills."""

    def swapped(value: object) -> object:
        if not _is_cache(value):
            return value
        other = copy.copy(value)
        other.layers = list(value.layers)
        other.layers[call.layer] = layer_cache
        return other

    args = [swapped(value) for value in call.args]
    kwargs = {name: swapped(value) for name, value in call.kwargs.items()}
    return _first(mixer.forward(*args, **kwargs))


def _is_cache(value: object) -> TypeGuard[KeyValueCache]:
    from transformers import Cache

    return isinstance(value, Cache)


def _new_cache(hf: TransformersModel) -> KeyValueCache:
    from transformers import DynamicCache

    return DynamicCache(config=hf.config)


def _cache_name(hf: TransformersModel) -> str:
    """What a model calls the cache that it is given (Mamba has a name of its own)."""
    return "cache_params" if "cache_params" in signature(hf.forward).parameters else PAST


def _states(layer_cache: object) -> list[Tensor]:
    held = getattr(layer_cache, "recurrent_states", None) or {}
    return [state for state in held.values() if isinstance(state, Tensor)]


def _apart(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    pairs = zip(a, b, strict=True)
    return sum(float((x - y).cpu().double().square().sum()) for x, y in pairs) ** 0.5


def _rank(writes: Sequence[Tensor]) -> float | None:
    """Mean over heads of the write's effective rank; None where a state is no matrix."""
    ranks: list[float] = []
    for write in writes:
        if write.ndim < 3:
            return None
        heads = rearrange(write[0], "... row column -> (...) row column").cpu().double()
        ranks += [effective_rank(head).item() for head in heads if head.abs().max() > 0]
    return sum(ranks) / len(ranks) if ranks else None


def _first(out: object) -> Tensor:
    first = out[0] if isinstance(out, tuple) else out
    assert isinstance(first, Tensor)
    return first


def _require_same(hf: TransformersModel, ids: Tensor, shown: Tensor) -> None:
    whole = hf(ids, use_cache=False).logits[:, -1].float()
    limit = CLOSE if next(hf.parameters()).dtype.itemsize > 2 else HALF_CLOSE
    apart = (whole - shown).abs().max()
    if not apart <= limit * whole.abs().max().clamp_min(1e-30):
        raise ModelError("token after token, its cache does not give what the whole text gives")


class _MixerCalls:
    """Every call of the mixers: what they were given, their cache before, what they gave."""

    def __init__(self, mixers: Mapping[int, nn.Module]) -> None:
        self.mixers, self.calls, self._stack = mixers, dict[int, _MixerCall](), ExitStack()
        self._with_cache = False

    def begin(self, *, with_cache: bool) -> None:
        """Forget what was called; keep a copy of each layer's cache before the next calls."""
        self.calls, self._with_cache = {}, with_cache

    def __enter__(self) -> _MixerCalls:
        for layer, mixer in self.mixers.items():
            before = mixer.register_forward_pre_hook(self._before(layer), with_kwargs=True)
            after = mixer.register_forward_hook(self._after(layer))
            self._stack.callback(before.remove)
            self._stack.callback(after.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _before(self, layer: int) -> Callable[..., None]:
        def note(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
            caches = [value for value in (*args, *kwargs.values()) if _is_cache(value)]
            if caches:
                kept = caches[0].layers[layer]
                before = copy.deepcopy(kept) if self._with_cache else None
                self.calls[layer] = _MixerCall(layer, args, kwargs, before)

        return note

    def _after(self, layer: int) -> Callable[..., None]:
        def note(module: nn.Module, args: Args, out: object) -> None:
            if layer in self.calls:
                self.calls[layer].out = _first(out).clone()

        return note
