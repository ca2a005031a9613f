"""Output gates of attention: what its output is multiplied by, for the sink token and for others.

A gate closed at a token writes nothing there, without any sink (Qwen3-Next, AFMoE). Where a hook
shows the gate before its sigmoid, that is read; else the ratio of what the output projection reads
to what attention mixed, entry by entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from melens.batches import Batch
from melens.capture import evaluating, forward, hooked
from melens.models.anatomy import anatomy
from melens.protocols import HookedModel

SHOWN = ("attn.hook_q_gate", "attn.hook_gate", "attn.gate.hook_out")
ONE = 1e-3
"""Within this of 1 everywhere, nothing is gated."""
SMALL = 1e-4
"""Entries below this share of their token's largest are left out of a ratio."""


@dataclass
class GateSums:
    """One layer's mean gates."""

    sink: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    is_open: bool = True
    """Whether everything seen so far was 1."""

    def add(self, gate: Tensor, mask: Tensor, position: int) -> None:
        """Take in one text's ``[pos, channel]``; entries outside the mask are not counted."""
        counts = mask.sum(-1).clamp_min(1)
        means = torch.where(mask, gate, 0).sum(-1) / counts
        rest = torch.arange(len(means)) != position
        self.sink.append(means[position].item())
        self.others.append(means[rest].mean().item())
        self.is_open &= bool(((gate - 1).abs()[mask] < ONE).all())


@torch.no_grad()
def gates(
    model: HookedModel, rows: Sequence[Sequence[int]], positions: Sequence[int]
) -> dict[int, GateSums]:
    """Mean output gate of every attention layer that has one.

    Args:    rows: token ids of each text; positions: its sink token.
    """
    found: dict[int, GateSums] = {}
    with ExitStack() as stack:
        reads = {layer: _Reader(model, layer, stack) for layer in anatomy(model).attention_layers}
        for row, position in zip(rows, positions, strict=True):
            hooks = [pair for read in reads.values() for pair in read.hooks]
            with hooked(model, hooks), evaluating(model):
                forward(model, Batch.of(torch.tensor([row])))
            for layer, read in reads.items():
                if (made := read.gate()) is not None:
                    found.setdefault(layer, GateSums()).add(*made, position)
    return {layer: sums for layer, sums in found.items() if not sums.is_open}


class _Reader:
    """Reads one layer's gate of one text at a time."""

    def __init__(self, model: HookedModel, layer: int, stack: ExitStack) -> None:
        known, prefix = model.hook_dict, f"blocks.{layer}."
        self.mixed: Tensor | None = None
        self.read: Tensor | None = None
        self.shown: Tensor | None = None
        site = next((prefix + s for s in SHOWN if prefix + s in known), None)
        self.hooks: list[tuple[str, Callable[..., None]]] = []
        if site is not None:
            self.hooks = [(site, self._keep("shown"))]
            return
        attn: Any = getattr(model.blocks[layer], "attn", None)
        inner = getattr(attn, "original_component", None)
        if isinstance(inner, nn.Module) and hasattr(attn, "show"):  # attention that is observed
            self.hooks = [(f"{prefix}attn.hook_z", self._keep("mixed"))]
            for module in inner.modules():
                if any(True for _ in module.children()):
                    continue
                handle = module.register_forward_pre_hook(self._reads)
                stack.callback(handle.remove)

    def gate(self) -> tuple[Tensor, Tensor] | None:
        """``[pos, channel]`` and which entries count; None where nothing was shown."""
        shown, mixed, read = self.shown, self.mixed, self.read
        self.shown = self.mixed = self.read = None
        if shown is not None:
            made = shown[0].float().cpu().flatten(1).sigmoid()
            return made, torch.ones_like(made, dtype=torch.bool)
        if mixed is None or read is None:
            return None
        z = mixed[0].float().cpu().flatten(1)
        mask = z.abs() > SMALL * z.abs().amax(-1, keepdim=True)
        return read[0].float().cpu() / torch.where(mask, z, 1.0), mask

    def _keep(self, name: str) -> Callable[..., None]:
        def keep(x: Tensor, hook: object) -> None:
            setattr(self, name, x.detach())

        return keep

    def _reads(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """The last layer that reads as many channels as were mixed is the output projection."""
        x = args[0] if args else None
        if self.mixed is None or not isinstance(x, Tensor):
            return
        weight = getattr(module, "weight", None)
        wide = x.ndim == 3 and x.shape[-1] == self.mixed.flatten(2).shape[-1]
        if wide and isinstance(weight, Tensor) and weight.ndim == 2:
            self.read = x.detach()
