"""The check that ends every load: do the hooks mean what they should, and is it the same model?"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from melens.batches import Batch
from melens.capture import evaluating, forward, hooked
from melens.errors import ContractError, ModelError
from melens.models.anatomy import (
    MISPLACED,
    Anatomy,
    Block,
    anatomy,
    is_folded,
    norm_of,
    pattern_hook,
    resid_post,
    resid_pre,
    residual_dtype,
)
from melens.models.complaints import first_line
from melens.models.decoder import layer_list
from melens.models.ffn import is_adapted
from melens.placement import has_other_forward, input_device
from melens.protocols import HookedModel, TransformersModel
from melens.shapes import TokenIds

PROBE_TOKENS = 8
WINDOWS = (
    "sliding_window",
    "window_size",
    "attention_chunk_size",
    "local_attention",
    "index_topk",
)
LONGEST_WINDOW = 64
"""A window up to this length is run past; a longer one would cost seconds at every load."""
ROUNDINGS, FLOOR = 8.0, 1e-3
"""Two implementations of attention differ by about one rounding (eps) of a token's largest entry a
block, and these add up like sqrt(blocks): 0.7 to 2.7 eps sqrt(blocks) over 32 random blocks in
bf16 and float16. A ME Layer makes more of it: 9e-5 in float32 on SmolLM2, 2.4e-4 on the same model
after a few steps of training. What is left out changes 1e-2 and more: room for a floor.
"""
HALF_QUANTILE = 0.75
"""In half precision a token's experts may change by rounding: not the worst token counts, but one
that a quarter of them exceeds.
"""
FAILS = (RuntimeError, ValueError, KeyError, IndexError, AttributeError, TypeError, AssertionError)
"""What a module raises that does not fit its arguments or its config."""


@dataclass(frozen=True)
class OwnAnswer:
    """A short run of a model that was not bridged, in its own implementation of attention."""

    name: str
    attention: str
    adapted: bool
    """Whether an adapter's layers stand in it, unmerged."""
    ids: TokenIds
    blocks: dict[int, Float[Tensor, "batch pos d_model"]]
    """Layer to the residual that leaves it, as far as its layers could be told."""
    logits: Float[Tensor, "batch pos d_vocab"] | None
    """None where only the first blocks were run."""
    hooked: tuple[str, ...] = ()
    """Modules with hooks of the caller's own, which a bridge may not run as the model does."""

    def require_same(self, blocks: dict[int, Tensor], logits: Tensor | None) -> None:
        """Hold a bridge's run of the same tokens against this.

        Raises:  ContractError: they differ by more than rounding; with the first layer that does.
        """
        off = {
            layer: miss
            for layer, own in self.blocks.items()
            if layer in blocks and (miss := _miss(own, blocks[layer], layer)) > 1
        }
        final = 0.0
        if self.logits is not None and logits is not None:
            final = _miss(self.logits, logits, max(self.blocks, default=0) + 1)
            # in half precision a ME Layer makes of a block's rounding what no limit foresees
            if self.logits.dtype.itemsize < 4 and not final > 1:
                return
        if not off and not final > 1:
            return
        where = f"from block {min(off)} on" if off else "in its logits"
        final = max(final, *off.values()) if off else final
        way_out = ""
        if self.hooked:
            way_out = self.hooks_said()
        elif self.adapted:
            way_out = " Merge its adapter first (merge_and_unload)."
        elif self.attention != "eager":
            way_out = (
                " If eager is the model you mean, load it with attn_implementation='eager' and "
                "give melens the object."
            )
        raise ContractError(
            f"{self.name} gives other numbers through its bridge, in eager attention, than by "
            f"itself ({self.attention}), {where}: {final:.0f} times what rounding explains. They "
            f"would be of another model.{way_out}"
        )

    def hooks_said(self) -> str:
        """Which hooks of the caller's act, and the way out; empty without any."""
        if not self.hooked:
            return ""
        return (
            f" It has hooks of its own at {', '.join(self.hooked[:3])}: remove those that change "
            "a value (handle.remove(), del module.forward), and make the change with "
            "melens.interventions."
        )


@torch.no_grad()
def own_answer(model: TransformersModel, *, upto: int | None = None) -> OwnAnswer:
    """Run a few tokens through a transformers model as it is.

    Args:    upto: the last block to run; None = all of it.
    Raises:  ModelError: it cannot run.
    """
    name, hooked = type(model).__name__, _hooked(model)
    ids = probe_ids(model.config).to(input_device(model))
    blocks: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def note(module: nn.Module, args: object, out: Tensor | Sequence[Tensor]) -> None:
            first = out if isinstance(out, Tensor) else out[0]
            blocks[layer] = first.detach().clone()
            if layer == upto:
                raise _Enough

        return note

    logits = None
    with evaluating(model), ExitStack() as stack, failing(f"{name} cannot run by itself"):
        for layer, block in enumerate(_layers(model)):
            stack.callback(block.register_forward_hook(keep(layer)).remove)
        with suppress(_Enough):
            logits = model(ids, use_cache=False).logits.detach()
    attention = str(getattr(model.config, "_attn_implementation", None) or "eager")
    return OwnAnswer(name, attention, is_adapted(model), ids, blocks, logits, hooked)


def _hooked(model: nn.Module) -> tuple[str, ...]:
    """Modules whose forward pass somebody looks into, or changes, or has put another one for."""
    return tuple(
        name or type(model).__name__
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks or has_other_forward(module)
    )


def probe_ids(config: object) -> TokenIds:
    """Two rows that differ in their last token, longer than a short window of attention."""
    inner = getattr(config, "get_text_config", None)
    config = config if inner is None else inner()
    windows = [getattr(config, name, None) for name in WINDOWS]
    short = [w for w in windows if isinstance(w, int) and 0 < w <= LONGEST_WINDOW]
    length = PROBE_TOKENS + (max(short) * 3 // 2 if short else 0)
    room = getattr(config, "max_position_embeddings", None) or getattr(config, "n_ctx", None)
    length = min(length, room) if isinstance(room, int) and room > 1 else length
    vocabulary = getattr(config, "vocab_size", None) or getattr(config, "d_vocab", 100)
    ids = (torch.arange(length)[None] + 3) % min(vocabulary, 100)
    return torch.cat([ids, torch.cat([ids[:, :-1], ids[:, :1]], dim=1)])


@contextmanager
def failing(what: str) -> Iterator[None]:
    """One ModelError for whatever another library raises inside.

    Raises:  ModelError: what could not be done, and why.
    """
    try:
        yield
    except FAILS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(f"{what} ({first_line(error, named=True)}).") from None


def force_eager(model: TransformersModel) -> None:
    """Switch a transformers model to eager attention, where its class can be switched."""
    can = getattr(type(model), "_can_set_attn_implementation", None)
    if getattr(model.config, "_attn_implementation", "eager") != "eager" and can and can():
        model.set_attn_implementation("eager")


class _Enough(Exception):
    """Raised after the last block that was asked for."""


def _layers(model: TransformersModel) -> nn.ModuleList | list[nn.Module]:
    try:
        return layer_list(model)
    except ModelError:
        return []


def _miss(own: Tensor, found: Tensor, layer: int) -> float:
    """How far they differ, in units of what rounding explains; above 1 is more than that."""
    if own.shape != found.shape:
        return math.inf
    eps, wide = torch.finfo(own.dtype).eps, torch.promote_types(own.dtype, torch.float32)
    own, found = own.to(wide), found.to(own.device, wide)
    each = (own - found).abs().amax(-1) / own.abs().amax(-1).clamp_min(1e-12)
    share = HALF_QUANTILE if eps > torch.finfo(torch.float32).eps else 1.0
    miss = each.flatten().float().quantile(share).item()
    return miss / max(FLOOR, ROUNDINGS * eps * math.sqrt(layer + 1)) if miss == miss else math.inf


SUM_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5}
"""Relative to the largest residual entry; half precision adds in steps of 2^-8 (bf16). A float64
model's norms and attention weights go through float32 all the same.
"""
HALF_SUM_TOLERANCE = 3e-2
ROW_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
HALF_ROW_TOLERANCE = 2e-2


@torch.no_grad()
def check_contract(model: HookedModel, own: OwnAnswer | None = None) -> Anatomy:
    """Run eight tokens through the model and hold every block against the contract.

    One pass, two rows that differ in their last token. Every write, residual and attention hook
    fires; resid_pre + attention + FFN = resid_post; attention rows sum to 1; no token sees later
    ones. A norm whose output is not its normalised input times its gain, or that stands elsewhere
    than its name says, is noted, and its gain refused when asked for.

    Args:    own: what the model said before it was bridged; its bridge must say the same.
    Raises:  ContractError: naming the block and the sum that does not hold. ModelError: the bridge
             cannot run.
    """
    parts = anatomy(model)
    seen: dict[str, Tensor] = {}
    done: list[int] = []
    last: list[Tensor] = []
    blocks: dict[int, Tensor] = {}

    def keep(site: str) -> Callable[..., None]:
        def read(x: Tensor, hook: object) -> None:
            seen[site] = x.detach()

        return read

    def close(block: Block) -> Callable[..., None]:
        def read(x: Tensor, hook: object) -> None:
            seen[resid_post(block.layer)] = x.detach()
            _move(seen, x.device)
            _check_block(model, block, seen)
            last[:] = [wide(seen[resid_post(block.layer)])]
            if own is not None and block.layer in own.blocks:
                blocks[block.layer] = seen[resid_post(block.layer)].clone()
            seen.clear()
            done.append(block.layer)

        return read

    hooks = [(site, keep(site)) for site in _every_site(model, parts)]
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


def _move(seen: dict[str, Tensor], device: torch.device) -> None:
    """What enters the first block of a device is still on the one before."""
    seen.update({site: value.to(device) for site, value in seen.items()})


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_causality(model: HookedModel, resid: Tensor) -> None:
    """A token must not see later ones: trajectories are computed from a prefix alone."""
    before, after = resid[:1, :-1], resid[1:, :-1]
    error = _largest_miss(before, after, [before, after])
    if not error <= SUM_TOLERANCE.get(residual_dtype(model), HALF_SUM_TOLERANCE):
        raise ContractError(
            f"changing the last token changes earlier ones (by {error:.1e}): this model is not "
            "causal, and melens reads only causal decoders."
        )


def _sites(model: HookedModel, block: Block) -> list[str]:
    sites = [resid_pre(block.layer), *block.mixer_writes, *block.others]
    sites += [block.ffn_write] if block.ffn_write else []
    sites += [pattern_hook(block.layer)] if block.attention else []
    return sites


def _every_site(model: HookedModel, parts: Anatomy) -> list[str]:
    known = set(model.hook_dict)  # to ask a bridge once a site would take longer than the run
    every = ((_sites(model, block), _norm_sites(model, block, known)) for block in parts.blocks)
    return [site for own, norms in every for site in (*own, *norms)]


def _norm_sites(model: HookedModel, block: Block, known: Container[str]) -> list[str]:
    if is_folded(model):
        return []
    ends = ("normalized", "out", "in")
    sites = [f"blocks.{block.layer}.{norm}.hook_{end}" for norm in block.norms for end in ends]
    return [site for site in sites if site in known]


def _check_block(model: HookedModel, block: Block, seen: dict[str, Tensor]) -> None:
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
    parts += [
        wide(seen[site]) for site in (*block.mixer_writes, block.ffn_write, *block.others) if site
    ]
    error = _largest_miss(torch.stack(parts).sum(0), after, [*parts, after])
    if not block.untold and not error <= SUM_TOLERANCE.get(dtype, HALF_SUM_TOLERANCE):
        raise ContractError(
            f"block {block.layer}: resid_pre + attention + FFN misses resid_post by {error:.1e} of "
            "a token's largest entry, so nothing can be attributed to its parts. If hooks are "
            "active on the model, leave them first."
        )
    if block.attention:
        _check_rows(block, seen, dtype)
    if not is_folded(model):
        _look_at_norms(model, block, seen, dtype)


def _largest_miss(made: Tensor, found: Tensor, scales: list[Tensor]) -> float:
    """Largest difference, relative to each token's own largest entry: no token hides another."""
    scale = torch.stack([part.abs().amax(-1) for part in scales]).amax(0).clamp(min=1e-12)
    return ((made - found).abs().amax(-1) / scale).max().item()


def _check_rows(block: Block, seen: dict[str, Tensor], dtype: torch.dtype) -> None:
    rows = wide(seen[pattern_hook(block.layer)]).sum(-1)
    # a learned sink takes its share of every row, and what is left is less than 1 by design
    off = (rows - 1).clamp_min(0) if block.learned_sink else (rows - 1).abs()
    error = off.max().item()
    if not error <= ROW_TOLERANCE.get(dtype, HALF_ROW_TOLERANCE):
        raise ContractError(f"block {block.layer}: attention rows miss 1 by {error:.1e}.")


def _look_at_norms(
    model: HookedModel, block: Block, seen: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Note which norms cannot be read; a model is not refused for one of them."""
    wrong = MISPLACED.setdefault(model, {})
    limit = ROW_TOLERANCE.get(dtype, HALF_ROW_TOLERANCE)
    for norm in block.norms:
        wrong.pop((block.layer, norm), None)
        if (why := _wrong_norm(model, block, norm, seen, limit)) is not None:
            wrong[block.layer, norm] = why


def _wrong_norm(
    model: HookedModel, block: Block, norm: str, seen: dict[str, Tensor], limit: float
) -> str | None:
    """What is wrong with a norm: where it stands, or what it makes of its normalised input."""
    prefix = f"blocks.{block.layer}.{norm}.hook_"
    if f"{prefix}normalized" not in seen or f"{prefix}out" not in seen:
        return "did not run as a module of its own"
    given, out = seen.get(f"{prefix}in"), wide(seen[f"{prefix}out"])
    before = wide(seen[resid_pre(block.layer)])
    written = sum((wide(seen[site]) for site in block.mixer_writes), torch.zeros_like(before))
    if given is not None and norm in ("ln1", "ln2"):
        homes = [before] if norm == "ln1" else [before + written, before]
        if not any(_largest_miss(wide(given), home, [home]) <= limit for home in homes):
            return "reads something else than the residual"
    if norm == "ln2_post" and block.ffn_write is not None:
        miss = _largest_miss(out, wide(seen[block.ffn_write]), [out])
        if not miss <= limit:
            return "makes something else than what the FFN writes"
    try:
        found = norm_of(model, block.layer, norm)
    except ModelError:
        return "is no normalisation times a gain"
    made = wide(seen[f"{prefix}normalized"]) * found.gain.to(out) + found.bias.to(out)
    error = _largest_miss(made, out, [made, out])
    return None if error <= limit else f"does not multiply by its gain (off by {error:.1e})"
