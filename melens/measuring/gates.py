"""Output gates of attention: what its output is multiplied by, for the sink token and for others.

A gate closed at a token writes nothing there, without any sink (Qwen3-Next, AFMoE). Measured, not
read off: the ratio of what the output projection reads to pattern times values, entry by entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from melens.batches import Batch
from melens.capture import evaluating, forward, hooked
from melens.models.anatomy import pattern_hook
from melens.models.attention import HeadView, attention_sites
from melens.protocols import Args, HookedModel

ONE = 1e-2
"""A ratio within this of 1 everywhere is no gate."""
SMALL = 1e-2
"""Entries below this share of their token's largest are left out of a ratio."""
LONGEST = 128
"""Tokens of a text that are read."""


@dataclass
class GateSums:
    """One layer's mean gates, a text each."""

    sink: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    is_open: bool = True
    """Whether everything seen so far was 1."""

    def add(self, mixed: Tensor, read: Tensor, position: int) -> None:
        """Take in one text's ``[pos, channel]`` before and after the gate."""
        counted = mixed.abs() > SMALL * mixed.abs().amax(-1, keepdim=True)
        gate = torch.where(counted, read / torch.where(counted, mixed, 1.0), 0.0)
        means = gate.sum(-1) / counted.sum(-1).clamp_min(1)
        rest = torch.arange(len(means)) != position
        self.sink.append(means[position].item())
        self.others.append(means[rest].mean().item())
        self.is_open &= bool(((gate - 1).abs()[counted] < ONE).all())


@torch.no_grad()
def gates(
    model: HookedModel, rows: Sequence[Sequence[int]], positions: Sequence[int]
) -> dict[int, GateSums]:
    """Mean output gate of every attention layer that has one.

    Args:    rows: token ids of each text; positions: its sink token, among the first 128.
    Returns: by layer; layers whose ratio is 1 everywhere, or whose values or output projection
             cannot be read, are left out. A norm or a factor in the gate's place counts as one.
    """
    sites = attention_sites(model)
    values = {view.layer: view for view in sites.views if view.site == "v"}
    sums = {layer: GateSums() for layer in sites.patterns if layer in values}
    with ExitStack() as stack:
        readers = [_Reader(model, layer, values[layer], stack) for layer in sums]
        hooks = [pair for reader in readers for pair in reader.hooks]
        for row, position in zip(rows, positions, strict=True):
            for reader in readers:
                reader.begin(sums[reader.layer], position)
            ids = torch.tensor([list(row[:LONGEST])])
            with hooked(model, hooks), evaluating(model):
                forward(model, Batch.of(ids))
            for reader in readers:
                reader.end()
    return {layer: made for layer, made in sums.items() if made.sink and not made.is_open}


class _Reader:
    """One layer's gate, text by text; nothing but sums is kept of a layer that has run."""

    def __init__(self, model: HookedModel, layer: int, values: HeadView, stack: ExitStack) -> None:
        self.layer, self.values = layer, values
        self._mixed: Tensor | None = None
        self._read: Tensor | None = None
        self._v: Tensor | None = None
        self._sums: GateSums | None = None
        self._position = 0
        self.hooks: list[tuple[str, Callable[..., None]]] = [
            (values.hook, self._take_values),
            (pattern_hook(layer), self._mix),
        ]
        attn = model.blocks[layer].attn
        named = f"blocks.{layer}.attn.o.hook_in"
        if named in model.hook_dict:
            self.hooks.append((named, self._take))
            return
        inner = getattr(attn, "original_component", None)  # a HookedTransformer has none
        for module in () if inner is None else inner.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2 and not any(module.children()):
                handle = module.register_forward_pre_hook(self._take_input)
                stack.callback(handle.remove)

    def begin(self, sums: GateSums, position: int) -> None:
        """A text is about to run."""
        self._sums, self._position = sums, position

    def end(self) -> None:
        """It has run."""
        sums, mixed, read = self._sums, self._mixed, self._read
        if sums is None or mixed is None or read is None:
            pass  # a layer that did not show one of them
        elif mixed.shape == read.shape:
            sums.add(mixed, read, self._position)
        self._mixed = self._read = self._v = None

    def _take_values(self, x: Tensor, hook: object) -> None:
        self._v = self.values.by_head(x.detach())[0]

    def _mix(self, x: Tensor, hook: object) -> None:
        if self._v is None or len(x[0]) % len(self._v):
            return
        v = repeat(self._v, "head pos d -> (head copy) pos d", copy=len(x[0]) // len(self._v))
        self._mixed = _flat(x.detach()[0].float() @ v.float())
        self._v = None

    def _take(self, x: Tensor, hook: object) -> None:
        """What the output projection reads; some bridges show the pattern only after that."""
        self._read = x.detach()[0].float().flatten(1).cpu()

    def _take_input(self, module: nn.Module, args: Args) -> None:
        """Of several layers that read as many channels the output projection is the last."""
        x, mixed = args[0] if args else None, self._mixed
        if mixed is not None and isinstance(x, Tensor) and x[0].numel() == mixed.numel():
            self._take(x, None)


def _flat(x: Tensor) -> Tensor:
    return rearrange(x, "head pos d -> pos (head d)").cpu()
