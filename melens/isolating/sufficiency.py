"""Is one block's write enough? Put it into an ordinary token and see what reaches the peak."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from melens.batches import Batch
from melens.errors import InterventionError
from melens.inputs import Inputs
from melens.interventions.core import Editor, Place, editing
from melens.interventions.now import Now
from melens.interventions.residual import write_sites
from melens.isolating.prefixes import Prefixes
from melens.measuring.located import Located
from melens.resume import Resumable
from melens.shapes import Resid, TokenMask

SEQUENCES = 4
DEPTH = 24
"""Ordinary tokens are taken no later than this: the run gets no longer than it must."""


def ordinary_tokens(inputs: Inputs, located: Located) -> Batch | None:
    """Prefixes that end in a token that is not massive; None where every token is."""
    rows = []
    for batch, marks in zip(inputs.batches, located.heavy, strict=True):
        for i in range(len(batch)):
            real = batch.mask[i]
            ids, marked = batch.ids[i][real][:DEPTH], marks[i][real][:DEPTH]
            plain = (~marked).nonzero().flatten()
            if marked.any() and len(plain):
                rows.append(ids[: int(plain[-1]) + 1].tolist())
    return Batch.pad(rows[:SEQUENCES]) if rows else None


def sufficiency(
    prefixes: Prefixes, ordinary: Batch, layer: int, part: str, runner: Resumable
) -> float:
    """The massive token's write of one part, in place of an ordinary token's own: what it makes.

    Blocks after it run as ever, so what they add or erase counts.

    Raises:  InterventionError: the block has no such part.
    """
    model = runner.model
    sites = write_sites(model, layer, part)
    writes = prefixes.read(list(sites))
    last = ordinary.positions.argmax(1)

    def choose(now: Now) -> TokenMask:
        width = torch.arange(now.positions.shape[1], device=last.device)
        return width[None] == last[:, None]

    def put(site: str) -> Float[Tensor, " d_model"]:
        return writes[site].mean(0)

    def editor(vector: Tensor) -> Editor:
        def edit(x: Tensor, chosen: TokenMask, now: Now) -> Tensor:
            return vector.to(x).expand(int(chosen.sum()), -1)

        return edit

    place = Place(model, layer, choose)
    with editing(place, {site: editor(put(site)) for site in sites}):
        final = runner.run(layer, runner.resid_pre(layer), upto=prefixes.peak + 1)
    return share_at(final, ordinary, prefixes)


def share_at(final: Resid, ordinary: Batch, prefixes: Prefixes) -> float:
    """What each row's last token has of the massive coordinate: mean over mean."""
    last = ordinary.positions.argmax(1).to(final.device)
    made = final[torch.arange(len(final), device=final.device), last, prefixes.dim]
    return (made.double().mean().cpu() / prefixes.clean.mean()).item()


def has_part(model: object, layer: int, part: str) -> bool:
    """Whether a block writes through its attention or FFN at all."""
    try:
        write_sites(model, layer, part)
    except InterventionError:
        return False
    return True
