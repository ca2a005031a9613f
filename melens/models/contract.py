"""The check that ends every load: do this model's hooks mean what melens takes them to mean?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from melens.batches import Batch
from melens.capture import evaluating, forward, hooked
from melens.errors import ContractError
from melens.models.anatomy import (
    FAMILIES,
    Anatomy,
    Block,
    anatomy,
    family_of,
    is_folded,
    norm_gain,
    pattern_hook,
    resid_post,
    resid_pre,
    residual_dtype,
)
from melens.models.own import OwnAnswer, failing, probe_ids

SUM_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5}
"""Relative to the largest residual entry; half precision adds in steps of 2^-8 (bf16). A float64
model's norms and attention weights go through float32 all the same.
"""
HALF_SUM_TOLERANCE = 3e-2
ROW_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
HALF_ROW_TOLERANCE = 2e-2


@torch.no_grad()
def check_contract(model: Any, own: OwnAnswer | None = None) -> Anatomy:
    """Run eight tokens through the model and hold every block against the contract.

    One pass, two rows that differ in their last token. Every write, residual and attention hook
    fires; resid_pre + attention + FFN = resid_post; attention rows sum to 1; each norm's output is
    its normalised input times the gain that the family's row says; no token sees later ones.

    Args:    own: what the model said before it was bridged; its bridge must say the same.
    Raises:  ContractError: naming the block and the sum that does not hold. ModelError: the bridge
             cannot run.
    """
    parts = anatomy(model)
    seen: dict[str, Tensor] = {}
    done: list[int] = []
    last: list[Tensor] = []
    blocks: dict[int, Tensor] = {}

    def keep(site: str) -> Any:
        def read(x: Tensor, hook: object) -> None:
            seen[site] = x.detach()

        return read

    def close(block: Block) -> Any:
        def read(x: Tensor, hook: object) -> None:
            seen[resid_post(block.layer)] = x.detach()
            _check_block(model, block, seen)
            last[:] = [wide(seen[resid_post(block.layer)])]
            if own is not None and block.layer in own.blocks:
                blocks[block.layer] = seen[resid_post(block.layer)].clone()
            seen.clear()
            done.append(block.layer)

        return read

    hooks = [(site, keep(site)) for block in parts.blocks for site in _sites(model, block)]
    hooks += [(resid_post(block.layer), close(block)) for block in parts.blocks]
    name = getattr(model.cfg, "architecture", None) or type(model).__name__
    with hooked(model, hooks), evaluating(model), failing(f"the bridge of {name} fails"):
        if own is None or own.logits is None:
            logits = None
            forward(model, Batch.of(probe_ids(model.cfg) if own is None else own.ids.cpu()))
        else:
            logits = model(own.ids, return_type="logits", use_cache=False)
    if done != list(range(model.cfg.n_layers)):
        raise ContractError(f"blocks fired in the order {done[:8]}, expected 0 to the last, once.")
    _check_causality(model, last[0])
    if own is not None:
        own.require_same(blocks, logits)
    return parts


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_causality(model: Any, resid: Tensor) -> None:
    """A token must not see later ones: trajectories are computed from a prefix alone."""
    before, after = resid[:1, :-1], resid[1:, :-1]
    error = _largest_miss(before, after, [before, after])
    if not error <= SUM_TOLERANCE.get(residual_dtype(model), HALF_SUM_TOLERANCE):
        raise ContractError(
            f"changing the last token changes earlier ones (by {error:.1e}): this model is not "
            "causal, and melens reads only causal decoders."
        )


def _sites(model: Any, block: Block) -> list[str]:
    sites = [resid_pre(block.layer), *block.mixer_writes]
    sites += [block.ffn_write] if block.ffn_write else []
    sites += [pattern_hook(block.layer)] if block.attention else []
    if _knows_gains(model):
        row = FAMILIES[str(family_of(model))]
        if {*block.norms} != {*row.pre_norms, *row.post_norms}:
            raise ContractError(
                f"block {block.layer} has norms {block.norms}, its family's row not."
            )
        for norm in block.norms:
            sites += [f"blocks.{block.layer}.{norm}.hook_{end}" for end in ("normalized", "out")]
    return sites


def _knows_gains(model: Any) -> bool:
    return family_of(model) is not None and not is_folded(model)


def _check_block(model: Any, block: Block, seen: dict[str, Tensor]) -> None:
    expected = {*_sites(model, block), resid_post(block.layer)}
    if silent := sorted(expected - set(seen)):
        raise ContractError(f"{silent[0]} exists but did not fire; melens cannot read this model.")
    dtype = residual_dtype(model)
    after = wide(seen[resid_post(block.layer)])
    if not torch.isfinite(after).all():
        raise ContractError(f"block {block.layer} leaves NaN or Inf in {dtype}; use float32.")
    if not torch.isfinite(after.float().norm(dim=-1)).all():
        raise ContractError(
            f"block {block.layer} leaves entries of {after.abs().max():.1e}: their squares do not "
            "fit into float32, in which norms and statistics are computed. Scale the model down."
        )
    parts = [wide(seen[resid_pre(block.layer)])]
    parts += [wide(seen[site]) for site in (*block.mixer_writes, block.ffn_write) if site]
    error = _largest_miss(torch.stack(parts).sum(0), after, [*parts, after])
    if not error <= SUM_TOLERANCE.get(dtype, HALF_SUM_TOLERANCE):
        raise ContractError(
            f"block {block.layer}: resid_pre + attention + FFN misses resid_post by {error:.1e} of "
            "a token's largest entry, so nothing can be attributed to its parts. If hooks are "
            "active on the model, leave them first."
        )
    if block.attention:
        _check_rows(block, seen, dtype)
    if _knows_gains(model):
        _check_norms(model, block, seen, dtype)


def _largest_miss(made: Tensor, found: Tensor, scales: list[Tensor]) -> float:
    """Largest difference, relative to each token's own largest entry: no token hides another."""
    scale = torch.stack([part.abs().amax(-1) for part in scales]).amax(0).clamp(min=1e-12)
    return ((made - found).abs().amax(-1) / scale).max().item()


def _check_rows(block: Block, seen: dict[str, Tensor], dtype: torch.dtype) -> None:
    rows = wide(seen[pattern_hook(block.layer)]).sum(-1)
    error = (rows - 1).abs().max().item()
    if not error <= ROW_TOLERANCE.get(dtype, HALF_ROW_TOLERANCE):
        raise ContractError(f"block {block.layer}: attention rows miss 1 by {error:.1e}.")


def _check_norms(model: Any, block: Block, seen: dict[str, Tensor], dtype: torch.dtype) -> None:
    for norm in block.norms:
        prefix = f"blocks.{block.layer}.{norm}.hook_"
        bias = getattr(getattr(model.blocks[block.layer], norm), "bias", None)
        gain = norm_gain(model, block.layer, norm)
        made = wide(seen[f"{prefix}normalized"]) * gain
        made = made + wide(bias) if isinstance(bias, Tensor) else made
        out = wide(seen[f"{prefix}out"])
        error = _largest_miss(made, out, [made, out])
        if not error <= ROW_TOLERANCE.get(dtype, HALF_ROW_TOLERANCE):
            raise ContractError(
                f"block {block.layer}: {norm} does not multiply by the gain its family's row says "
                f"(off by {error:.1e}); the row's gain_offset is wrong for this model, or an "
                "adapter is on the norm: merge it first."
            )
