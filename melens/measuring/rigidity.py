"""How constant the massive token is: from layer to layer, and from input to input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from melens.inputs import Inputs
from melens.locating.trajectory import Path, trace_with
from melens.models.anatomy import anatomy

CHUNK_BYTES = 2**28
"""Activations of at most this size are held at a time while inputs are compared."""
RESID = "resid_post"


@dataclass(frozen=True)
class Observation:
    """One input's token: its trajectory, and its rows after every norm."""

    path: Path
    outputs: dict[str, dict[int, Tensor]]
    """Norm -> layer -> the token's row at the norm's output."""
    inputs: dict[str, dict[int, Tensor]]
    """The same at the norm's input; empty where the model does not show it."""

    def rows(self, site: str) -> dict[int, Tensor]:
        """Rows of the residual, or of a norm's output, by layer."""
        if site == RESID:
            return dict(enumerate(self.path.resid[1:]))
        return self.outputs[site]


def observe(inputs: Inputs, prefixes: Sequence[Sequence[int]]) -> Iterator[Observation]:
    """Trajectories of every prefix's last token with its rows around every norm, in order."""
    model, blocks = inputs.model, anatomy(inputs.model).blocks
    known = model.hook_dict
    taps = {
        (end, norm, block.layer): name
        for block in blocks
        for norm in block.norms
        for end in ("in", "out")
        if (name := f"blocks.{block.layer}.{norm}.hook_{end}") in known
    }
    per_prefix = 8 * model.cfg.d_model * (len(taps) + 4 * len(blocks))
    step = max(1, min(128, CHUNK_BYTES // per_prefix))
    for start in range(0, len(prefixes), step):
        part = prefixes[start : start + step]
        paths, found = trace_with(model, part, taps.values(), batch_size=step)
        for i, path in enumerate(paths):
            ends: dict[str, dict[str, dict[int, Tensor]]] = {"in": {}, "out": {}}
            for (end, norm, layer), name in taps.items():
                ends[end].setdefault(norm, {})[layer] = found[name][i]
            yield Observation(path, ends["out"], ends["in"])


@dataclass
class Rigidity:
    """Cosines between inputs, from running sums of unit vectors; keeps each input's peak alone."""

    n_layers: int
    peak: int
    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Site -> [layer, d_model], for the layers in ``layers``."""
    layers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    at_peak: list[Tensor] = field(default_factory=list)

    def add(self, seen: Observation) -> None:
        """Take in one input."""
        self.count += 1
        self.at_peak.append(seen.path.resid[self.peak + 1])
        for site in (RESID, *seen.outputs):
            rows = seen.rows(site)
            units = torch.nn.functional.normalize(torch.stack(list(rows.values())), dim=-1)
            if site in self.sums:
                units = units + self.sums[site]
            self.sums[site], self.layers[site] = units, tuple(rows)

    def between_inputs(self, site: str) -> tuple[float | None, ...]:
        """Mean cosine over all pairs of inputs: (|sum of units|^2 - n) / (n (n - 1))."""
        n = self.count
        if n < 2:
            return (None,) * self.n_layers
        means = (self.sums[site].square().sum(-1) - n) / (n * (n - 1))
        by_layer = dict(zip(self.layers[site], means.tolist(), strict=True))
        return tuple(by_layer.get(layer) for layer in range(self.n_layers))


def consecutive(rows: dict[int, Tensor], n_layers: int) -> tuple[float | None, ...]:
    """Cosine of every layer's row with the layer before; None at the first, and at gaps."""
    return tuple(
        torch.nn.functional.cosine_similarity(rows[layer], rows[layer - 1], dim=0).item()
        if layer in rows and layer - 1 in rows
        else None
        for layer in range(n_layers)
    )
