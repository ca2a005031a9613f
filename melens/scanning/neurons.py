"""One layer's neurons: the ceiling of each, in one pass over each matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from melens.errors import WeightsError
from melens.metrics.ceilings import (
    FLOORS,
    SQUARED,
    CeilingReach,
    Moments,
    alone_after_norm,
    best_input,
    gated_reach,
    on_mean_zero,
    plain_reach,
    row_moments,
    squared_reach,
    whole_after_norm,
    with_constant,
)
from melens.models.checkpoint import Checkpoint
from melens.results.base import Part
from melens.results.scan import Candidate, LayerCeiling, Needs
from melens.scanning.plan import CheckpointPlan, FfnPlan, LayerPlan, Matrix

HIGHEST = 8
"""Neurons of a layer that are kept with all their particulars, at most."""
LOUD = 10.0
"""Times the median neuron's ceiling; below it only a layer's highest is kept."""
NEEDED = 8
"""Coordinates kept of the input that a neuron needs."""


class LayerScan(Part):
    """A scanned layer, as it is kept on disk."""

    row: LayerCeiling
    highest: tuple[Candidate, ...]


@dataclass(frozen=True)
class Norms:
    """Gains around one layer's FFN."""

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"] | None
    post: Float[Tensor, " d_model"] | None
    factor: float
    """What the write is multiplied by, behind all norms."""


class Read(NamedTuple):
    """What one FFN's gate and up say of each neuron."""

    reach: CeilingReach
    cosine: Float[Tensor, " neuron"] | None


class Columns(NamedTuple):
    """What one FFN's down projection says of each neuron."""

    largest: Float[Tensor, " neuron"]
    """Its largest |entry|, times the post-norm's gain where there is one."""
    squared: Float[Tensor, " neuron"]
    """|column|^2 without the gain; zeros where it is not needed."""
    piece: Tensor
    """The piece of the matrix in which its largest entry lies."""


@torch.no_grad()
def scan_layer(files: Checkpoint, plan: CheckpointPlan, layer: LayerPlan, device: str) -> LayerScan:
    """Every neuron's ceiling in one layer, and the particulars of the highest.

    Raises:  WeightsError: NaN or Inf, or a file that ends early; names the tensor.
    """
    if layer.reason is not None:
        return LayerScan(
            row=LayerCeiling(layer=layer.layer, covered=False, reason=layer.reason), highest=()
        )
    norms = _norms(files, plan, layer)
    ffns = [_Ffn(files, plan, ffn, norms, device) for ffn in layer.ffns]
    every = torch.cat([ffn.ceilings for ffn in ffns])
    median = _median(every)
    highest = _highest(ffns, every, layer.layer, median)
    return LayerScan(row=_row(layer, highest[0], every, median, norms), highest=tuple(highest))


def _median(ceilings: Float[Tensor, " neuron"]) -> float:
    """Of the neurons that can write at all: half of a pruned layer's may be dead."""
    alive = ceilings[ceilings > 0]
    return alive.median().item() if alive.numel() else 0.0


def _highest(ffns: list[_Ffn], every: Tensor, layer: int, median: float) -> list[Candidate]:
    """The neurons with the highest ceilings of all of a layer's FFNs, the highest first."""
    top = every.topk(min(HIGHEST, every.numel()))
    best = top.indices[: max(1, int((top.values >= LOUD * median).sum()))].tolist()
    found: list[Candidate] = []
    first = 0
    for ffn in ffns:
        last = first + ffn.ceilings.numel()
        found += ffn.candidates(layer, [n - first for n in best if first <= n < last], median)
        first = last
    return sorted(found, key=lambda candidate: -candidate.ceiling)


def _row(
    layer: LayerPlan, best: Candidate, every: Tensor, median: float, norms: Norms
) -> LayerCeiling:
    whole = None if norms.post is None else abs(norms.factor) * whole_after_norm(norms.post)
    gated = any(ffn.gate is not None for ffn in layer.ffns)
    return LayerCeiling(
        layer=layer.layer,
        covered=True,
        neurons=every.numel(),
        median=median,
        path="after a norm" if whole is not None else "gated" if gated else "plain",
        ceiling=best.ceiling,
        ratio_to_median=best.ratio_to_median,
        neuron=best.neuron,
        expert=best.expert,
        dim=best.dim,
        sign=best.sign,
        whole=None if whole is None else whole.max().item(),
        whole_dim=None if whole is None else int(whole.argmax()),
    )


def _norms(files: Checkpoint, plan: CheckpointPlan, layer: LayerPlan) -> Norms:
    d, offset = plan.d_model, plan.layout.offset
    gain = torch.ones(d) if layer.norm is None else files.vector(layer.norm, d) + offset
    bias = None if layer.norm_bias is None else files.vector(layer.norm_bias, d)
    post = None if layer.post is None else files.vector(layer.post, d) + offset
    return Norms(gain, bias, post, layer.factor)


class _Ffn:
    """One FFN's neurons; ``ceilings`` in float64 on the CPU."""

    def __init__(
        self, files: Checkpoint, plan: CheckpointPlan, ffn: FfnPlan, norms: Norms, device: str
    ) -> None:
        self.files, self.plan, self.ffn, self.norms, self.device = files, plan, ffn, norms, device
        self.read = self._read_in()
        self.columns = self._read_down()
        if norms.post is None:
            self.ceilings = self.read.reach.largest * self.columns.largest * plan.route
        else:
            self.ceilings = alone_after_norm(
                self.columns.largest, self.columns.squared, plan.d_model
            )
            self.ceilings[self.read.reach.largest == 0] = 0.0
        self.ceilings *= abs(norms.factor)

    def candidates(self, layer: int, neurons: list[int], median: float) -> list[Candidate]:
        """Some neurons with all their particulars."""
        entries = self._entries(neurons)
        return [self._candidate(layer, neuron, entries[neuron], median) for neuron in neurons]

    def _candidate(
        self, layer: int, neuron: int, entry: tuple[int, float], median: float
    ) -> Candidate:
        dim, value = entry
        positive, negative = (side[neuron].item() for side in self.read.reach)
        gain = self.norms.factor * (1.0 if self.norms.post is None else self.norms.post[dim].item())
        up = positive >= negative
        ceiling = self.ceilings[neuron].item()
        larger, smaller = max(positive, negative), min(positive, negative)
        share = smaller / larger if larger else 0.0
        if self.norms.post is not None:  # the norm restores the size, whichever sign it has
            share = float(smaller > 0)
        cosine = None if self.read.cosine is None else self.read.cosine[neuron].item()
        return Candidate(
            layer=layer,
            neuron=neuron,
            expert=self.ffn.expert,
            dim=dim,
            ceiling=ceiling,
            against=ceiling * share,
            cosine=cosine,
            value=value,
            ratio_to_median=ceiling / median if median else 0.0,
            sign=1 if (value * gain >= 0) == up else -1,
            needs=self._needs(neuron),
        )

    def _entries(self, neurons: list[int]) -> dict[int, tuple[int, float]]:
        """The dim of each neuron's largest (scaled) down entry, and the entry."""
        down = self.ffn.down
        if self.plan.layout.transposed:
            return {neuron: self._largest(self._row(down, neuron), 0) for neuron in neurons}
        found = {}
        step = self.files.piece(down.name)
        for piece in sorted({int(self.columns.piece[neuron]) for neuron in neurons}):
            first, last = piece * step, min(piece * step + step, down.rows)
            block = self.files.rows(down.name, down.first + first, down.first + last)
            for neuron in neurons:
                if int(self.columns.piece[neuron]) == piece:
                    found[neuron] = self._largest(block[:, neuron].float(), first)
        return found

    def _largest(self, column: Tensor, first: int) -> tuple[int, float]:
        """Of a part of a down column that begins at dim ``first``."""
        post = self.norms.post
        scaled = column if post is None else column * post[first : first + column.numel()]
        at = int(scaled.abs().argmax())
        return first + at, column[at].item()

    def _needs(self, neuron: int) -> Needs:
        first = self._input_row(self.ffn.gate or self.ffn.up, neuron)
        second = None if self.ffn.gate is None else self._input_row(self.ffn.up, neuron)
        unit = best_input(first, second, mean_zero=self.plan.layout.layer_norm)
        top = unit.abs().topk(min(NEEDED, unit.numel())).indices
        return Needs(
            dims=tuple(top.tolist()),
            weights=tuple(unit[top].tolist()),
            share=min(1.0, float((unit[top] ** 2).sum())),
        )

    def _input_row(self, matrix: Matrix, neuron: int) -> Tensor:
        if not self.plan.layout.transposed:
            return self._row(matrix, neuron) * self.norms.gain
        whole = self.files.rows(matrix.name, matrix.first, matrix.first + matrix.rows)
        return whole[:, neuron].float() * self.norms.gain

    def _row(self, matrix: Matrix, row: int) -> Tensor:
        at = matrix.first + row
        return self.files.rows(matrix.name, at, at + 1)[0].float().clone()

    def _read_in(self) -> Read:
        """Gate and up side by side, piece by piece."""
        d, ffn = self.plan.d_model, self.ffn
        layout = self.plan.layout
        sums = _Sums(
            self.norms, self.device, mean_zero=layout.layer_norm, transposed=layout.transposed
        )
        for gate, up in self._pairs():
            sums.add(gate, up)
        rows, (w_sum, u_sum), (w_offset, u_offset) = sums.result()
        self._finite(ffn.gate or ffn.up, rows.first)
        self._finite(ffn.up, rows.second)
        if layout.layer_norm:
            rows = on_mean_zero(rows, (w_sum, u_sum), d)
        w_offset = w_offset + self._bias(ffn.gate_bias, ffn)
        u_offset = u_offset + self._bias(ffn.up_bias, ffn)
        if ffn.gate is None and self.plan.act == SQUARED:
            return Read(squared_reach(rows.second, u_offset, d), None)
        if ffn.gate is None:
            return Read(plain_reach(rows.second, u_offset, d, FLOORS[self.plan.act]), None)
        sizes = (rows.first * rows.second).clamp(min=0).sqrt()
        cosine = torch.where(sizes > 0, rows.cross / sizes.clamp(min=1e-300), 0.0).clamp(-1, 1)
        radius = d
        if w_offset.any() or u_offset.any():
            rows, radius = with_constant(rows, (w_offset, u_offset)), d + 1
        return Read(gated_reach(rows, radius), cosine)

    def _bias(self, name: str | None, ffn: FfnPlan) -> Tensor:
        neurons = ffn.up.columns if self.plan.layout.transposed else ffn.up.rows
        return (
            torch.zeros(1).double() if name is None else self.files.vector(name, neurons).double()
        )

    def _pairs(self) -> Iterator[tuple[Tensor | None, Tensor]]:
        gate, up = self.ffn.gate, self.ffn.up
        step = self.files.piece(up.name)
        for first in range(0, up.rows, step):
            last = min(first + step, up.rows)
            second = self.files.rows(up.name, up.first + first, up.first + last, slot=1)
            if gate is None:
                yield None, second
            else:
                yield self.files.rows(gate.name, gate.first + first, gate.first + last), second

    def _read_down(self) -> Columns:
        down, post = self.ffn.down, self.norms.post
        gain = None if post is None else post.to(self.device)
        neurons_are_rows = self.plan.layout.transposed
        largest, squared = [], []
        step = self.files.piece(down.name)
        for first in range(0, down.rows, step):
            last = min(first + step, down.rows)
            block = self.files.rows(down.name, down.first + first, down.first + last)
            block = block.to(self.device)
            if gain is not None:
                block = block.float()
                squared.append((block * block).sum(int(neurons_are_rows)).cpu())
                block = block * (gain if neurons_are_rows else gain[first:last, None])
            largest.append(block.abs_().amax(int(neurons_are_rows)).float().cpu())
        if neurons_are_rows:
            most = torch.cat(largest)
            at = torch.zeros(most.numel(), dtype=torch.long)
            total = torch.cat(squared) if squared else torch.zeros_like(most)
        else:
            most, at = torch.stack(largest).max(0)
            total = torch.stack(squared).sum(0) if squared else torch.zeros_like(most)
        self._finite(down, most)
        return Columns(most.double(), total.double(), at)

    def _finite(self, matrix: Matrix, values: Tensor) -> None:
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            blob = self.files.stored(matrix.name).blob
            raise WeightsError(
                f"{matrix.name} in {blob.name} holds NaN or Inf, or values too large to square "
                f"(in {bad} of {values.numel()} neurons); the checkpoint is damaged, or was saved "
                "in a dtype too small for it."
            )


class _Sums:
    """Moments of gate and up rows, gathered piece by piece."""

    def __init__(self, norms: Norms, device: str, *, mean_zero: bool, transposed: bool) -> None:
        self.mean_zero, self.transposed = mean_zero, transposed
        # the mean that is taken off later can be nearly all of a row
        kind = torch.float64 if mean_zero else torch.float32
        self.gain = norms.gain.to(device, kind)
        self.bias = None if norms.bias is None else norms.bias.to(device, kind)
        self._found: list[Tensor] = []
        self._at = 0

    def add(self, gate: Tensor | None, up: Tensor) -> None:
        """Take in a piece of both; without a gate, up stands for both."""
        second = up.to(self.gain)
        first = second if gate is None else gate.to(self.gain)
        gain, bias = self.gain, self.bias
        if self.transposed:  # the piece holds some input dims of every neuron
            part = slice(self._at, self._at + first.shape[0])
            self._at += first.shape[0]
            first, second = first.T, second.T
            gain, bias = gain[part], None if bias is None else bias[part]
        none = second.new_zeros(second.shape[0])
        sums = [first @ gain, second @ gain] if self.mean_zero else [none, none]
        offsets = [none, none] if bias is None else [first @ bias, second @ bias]
        rows = row_moments(None if gate is None else first, second, gain)
        self._found.append(torch.stack([*rows, *sums, *offsets]).cpu().double())

    def result(self) -> tuple[Moments, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Moments, sums of each row with the gain, and what the norm's bias adds."""
        if self.transposed:
            total = torch.stack(self._found).sum(0)
        else:
            total = torch.cat(self._found, dim=1)
        return Moments(total[0], total[1], total[2]), (total[3], total[4]), (total[5], total[6])
