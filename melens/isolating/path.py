"""How the massive token grows inside a block, and whether one block's write is enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from melens.batches import Batch
from melens.capture import stream
from melens.errors import InterventionError, SiteError
from melens.inputs import Inputs
from melens.interventions.context import PassTokens
from melens.interventions.core import Editor, Place, editing
from melens.interventions.residual import write_sites
from melens.isolating.runs import Prefixes, Sizes
from melens.measuring.located import Located
from melens.models.anatomy import anatomy, resid_post
from melens.models.ffn import FFN, ffn_input, ffn_of
from melens.protocols import HookedModel, JsonObject
from melens.results.isolate import Step
from melens.resume import Resumable
from melens.shapes import Resid, TokenMask

ROWS_A_SEQUENCE = 64


@dataclass
class BranchNorms:
    """Reducer: norm of the massive tokens, and the median norm of the others, by sequence."""

    heavy: Sequence[Tensor]
    token: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    seen: int = 0

    def update(self, x: Tensor, batch: Batch) -> None:
        """Take in ``[batch, pos, width]``."""
        marks = self.heavy[self.seen].to(x.device)
        self.seen += 1
        size = x.detach().float().norm(dim=-1)
        for i in range(len(batch)):
            rest = size[i][batch.mask[i] & ~marks[i]]
            if marks[i].any() and len(rest):
                self.token.append(size[i][marks[i]][0].item())
                self.others.append(rest.median().item())

    def result(self) -> tuple[float, float]:
        """Both, as means over sequences."""
        count = max(len(self.token), 1)
        return sum(self.token) / count, sum(self.others) / count


@dataclass
class Others:
    """Reducer: some rows of ordinary tokens, the first ones of every sequence."""

    heavy: Sequence[Tensor]
    rows: list[Tensor] = field(default_factory=list)
    seen: int = 0

    def update(self, x: Tensor, batch: Batch) -> None:
        """Take in ``[batch, pos, width]``."""
        marks = self.heavy[self.seen].to(x.device)
        self.seen += 1
        for i in range(len(batch)):
            self.rows.append(x.detach()[i][batch.mask[i] & ~marks[i]][:ROWS_A_SEQUENCE].float())

    def result(self) -> Tensor:
        """``[token, width]``."""
        return torch.cat(self.rows)


@dataclass(frozen=True)
class Branch:
    """What one pass over the texts shows of a block's FFN branch."""

    steps: tuple[Step, ...]
    others: Tensor | None
    """FFN inputs of ordinary tokens; None where the block has no FFN with neurons."""


def branch_of(inputs: Inputs, located: Located, layer: int) -> Branch:
    """One pass: norms at every site of a block's FFN branch, and ordinary FFN inputs."""
    sites = _sites(inputs.model, layer)
    taps: JsonObject = {hook: BranchNorms(located.heavy) for hook in sites.values()}
    others = Others(located.heavy) if "product" in sites else None
    if others is not None:
        taps[_unused_input(inputs.model, layer, taps)] = others
    stream(inputs.model, inputs.batches, taps)
    steps = []
    for name, hook in sites.items():
        token, rest = taps[hook].result()
        steps.append(
            Step(site=name, token=token, median_others=rest, ratio=token / max(rest, 1e-12))
        )
    return Branch(tuple(steps), others.result() if others is not None else None)


def sizes_of(inputs: Inputs, located: Located) -> dict[int, Sizes]:
    """Ordinary sizes of product and write at every layer; no product without neurons."""
    taps: JsonObject = {}
    hooks: dict[int, tuple[str, FFN | None]] = {}
    for block in anatomy(inputs.model).blocks:
        if block.ffn_write is not None:
            ffn = _ffn(inputs.model, block.layer)
            hooks[block.layer] = block.ffn_write, ffn
            taps[block.ffn_write] = BranchNorms(located.heavy)
            taps |= {ffn.product: BranchNorms(located.heavy)} if ffn is not None else {}
    stream(inputs.model, inputs.batches, taps)

    def rms(ffn: FFN | None) -> float:
        return taps[ffn.product].result()[1] / len(ffn.down) ** 0.5 if ffn is not None else 0.0

    return {
        layer: Sizes(rms(ffn), taps[write].result()[1]) for layer, (write, ffn) in hooks.items()
    }


def _sites(model: HookedModel, layer: int) -> dict[str, str]:
    """Name of a step -> its hook, in the order of the flow. The gate is before its activation."""
    prefix, block, ffn = f"blocks.{layer}.", anatomy(model).blocks[layer], _ffn(model, layer)
    found = {"resid_mid": f"{prefix}hook_resid_mid"}
    found["norm"] = f"{prefix}{block.ffn_norm}.hook_out"
    if ffn is not None:
        found |= {"gate": ffn.gate or "", "up": ffn.up, "product": ffn.product, "down": ffn.output}
    if block.ffn_write != found.get("down"):
        found["post-norm" if "ln2_post" in block.norms else "down"] = block.ffn_write or ""
    found["resid_post"] = resid_post(layer)
    return {name: hook for name, hook in found.items() if hook in model.hook_dict}


def has_neurons(model: HookedModel, layer: int) -> bool:
    """Whether a block's FFN has neurons of its own."""
    return _ffn(model, layer) is not None


def _ffn(model: HookedModel, layer: int) -> FFN | None:
    try:
        return ffn_of(model, layer)
    except SiteError:  # experts, or no FFN: their neurons are not to be told apart
        return None


def _unused_input(model: HookedModel, layer: int, taken: Mapping[str, object]) -> str:
    """A hook of the FFN's input that no other reducer reads."""
    site = ffn_input(model, layer)
    return (
        site
        if site not in taken
        else f"blocks.{layer}.{anatomy(model).blocks[layer].ffn_norm}.hook_out"
    )


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

    def choose(now: PassTokens) -> TokenMask:
        width = torch.arange(now.positions.shape[1], device=last.device)
        return width[None] == last[:, None]

    def put(site: str) -> Float[Tensor, " d_model"]:
        return writes[site].mean(0)

    def editor(vector: Tensor) -> Editor:
        def edit(x: Tensor, chosen: TokenMask, now: PassTokens) -> Tensor:
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


def has_part(model: HookedModel, layer: int, part: str) -> bool:
    """Whether a block writes through its attention or FFN at all."""
    try:
        write_sites(model, layer, part)
    except InterventionError:
        return False
    return True
