"""Second pass: the exact trajectories of a few tokens, from the shortest input that makes them.

Causality makes a token's residual depend on its prefix alone, so a first token needs one token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from melens.batches import Batch
from melens.capture import stream
from melens.locating.thresholds import last_body_layer
from melens.metrics import cosines, write_shares
from melens.models.anatomy import Block, anatomy, resid_post, resid_pre
from melens.protocols import HookedModel
from melens.shapes import Trajectory


@dataclass(frozen=True)
class Path:
    """One token through all layers. Step 0 is the embedding, step l + 1 the output of layer l."""

    token_id: int
    position: int
    resid: Trajectory
    mixer: Float[Tensor, "layer d_model"]
    ffn: Float[Tensor, "layer d_model"]
    whole: Float[Tensor, "layer d_model"] | None = None
    """What blocks added whose parts cannot be told; zero elsewhere. None = there is none."""

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.mixer)

    @property
    def norms(self) -> Float[Tensor, " step"]:
        """Norm at every step."""
        return self.resid.norm(dim=-1)

    @property
    def peak(self) -> int:
        """Layer of the largest norm, the final window left out."""
        return int(self.norms[1 : last_body_layer(self.n_layers) + 2].argmax())

    @property
    def shares(self) -> Float[Tensor, " layer"]:
        """Write share of every block: mixer and FFN together."""
        told = self.part_shares(self.mixer) + self.part_shares(self.ffn)
        return told if self.whole is None else told + self.part_shares(self.whole)

    @property
    def embedding_share(self) -> float:
        """The embedding's own share: with all writes up to the peak it sums to 1."""
        return self.part_shares(self.resid[:1]).item()

    def part_shares(self, writes: Float[Tensor, "layer d_model"]) -> Float[Tensor, " layer"]:
        """Shares of the vector at the peak."""
        return write_shares(writes, self.resid[self.peak + 1])

    @property
    def cosines(self) -> Float[Tensor, " step"]:
        """Cosine of every step with the direction at the peak."""
        return cosines(self.resid, self.resid[self.peak + 1])

    def entry(self, layer: int) -> tuple[int, float]:
        """Dimension and signed value of the largest |x| at a layer's output."""
        row = self.resid[layer + 1]
        dim = int(row.abs().argmax())
        return dim, row[dim].item()


@dataclass
class LastRow:
    """Reducer: the row of each sequence's last real token, in float64 on the CPU."""

    batches: list[Tensor] = field(default_factory=list)

    def update(self, x: Tensor, batch: Batch) -> None:
        """Take in ``[batch, pos, d_model]``."""
        index = batch.positions.argmax(dim=-1)
        here = torch.arange(len(batch), device=x.device)
        self.batches.append(x.detach()[here, index.to(x.device)].float().cpu().double())

    def result(self) -> Float[Tensor, "sequence d_model"]:
        """One row a sequence."""
        return torch.cat(self.batches)


def trace(model: HookedModel, prefixes: Sequence[Sequence[int]]) -> list[Path]:
    """Trajectories of the last token of every prefix, in the order given."""
    return trace_with(model, prefixes, ())[0] if prefixes else []


def trace_with(
    model: HookedModel,
    prefixes: Sequence[Sequence[int]],
    sites: Iterable[str],
    *,
    batch_size: int = 16,
) -> tuple[list[Path], dict[str, Float[Tensor, "prefix d_model"]]]:
    """:func:`trace`, and the same tokens' activations at other ``[batch, pos, d_model]`` sites."""
    blocks = anatomy(model).blocks
    needed = [resid_pre(0)]
    for block in blocks:
        writes = [*block.mixer_writes, block.ffn_write, *block.others]
        needed += [*(site for site in writes if site), resid_post(block.layer)]
    extra = list(sites)
    done = last_rows(model, prefixes, [*needed, *extra], batch_size=batch_size)
    paths = [_path(done, blocks, row, prefix) for row, prefix in enumerate(prefixes)]
    return paths, {site: done[site] for site in extra}


def last_rows(
    model: HookedModel,
    prefixes: Sequence[Sequence[int]],
    sites: Iterable[str],
    *,
    batch_size: int = 16,
) -> dict[str, Float[Tensor, "prefix d_model"]]:
    """Activations of every prefix's last token at ``[batch, pos, d_model]`` sites, in order.

    Prefixes of one length share a batch, so nothing is padded.
    """
    order = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))
    groups: list[list[int]] = []
    for i in order:
        full = not groups or len(groups[-1]) == batch_size
        if full or len(prefixes[groups[-1][0]]) != len(prefixes[i]):
            groups.append([])
        groups[-1].append(i)
    taps = {site: LastRow() for site in sites}
    stream(model, [Batch.of(torch.tensor([prefixes[i] for i in group])) for group in groups], taps)
    back = torch.tensor([i for group in groups for i in group]).argsort()
    return {site: tap.result()[back] for site, tap in taps.items()}


def _path(
    done: dict[str, Tensor], blocks: Sequence[Block], row: int, prefix: Sequence[int]
) -> Path:
    empty = torch.zeros_like(done[resid_pre(0)][row])
    steps = [done[resid_pre(0)][row]] + [done[resid_post(block.layer)][row] for block in blocks]
    mixer = [sum((done[site][row] for site in block.mixer_writes), empty) for block in blocks]
    ffn = [
        sum((done[site][row] for site in (block.ffn_write, *block.others) if site), empty)
        for block in blocks
    ]
    untold = torch.tensor([bool(block.untold) for block in blocks], device=empty.device)
    resid = torch.stack(steps)
    return Path(
        int(prefix[-1]),
        len(prefix) - 1,
        resid,
        torch.stack(mixer),
        torch.stack(ffn),
        resid.diff(dim=0) * untold[:, None] if untold.any() else None,
    )
