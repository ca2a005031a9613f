"""What a transformers model itself says, before it is bridged: its bridge must say the same.

Attention patterns are read in eager attention, which melens and TransformerLens force. Where a
model's own attention computes something else (a window, a cap or a scale that its eager path, or
the bridge's, leaves out), every number would be of another model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from melens.capture import evaluating
from melens.errors import ContractError, ModelError
from melens.models.decoder import layer_list
from melens.models.effective import is_adapted
from melens.shapes import TokenIds

PROBE_TOKENS = 8
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size", "local_attention")
LONGEST_WINDOW = 64
"""A window up to this length is run past; a longer one would cost seconds at every load."""
ROUNDINGS, FLOOR = 8.0, 1e-4
"""Two implementations of attention differ by about one rounding (eps) of a token's largest entry a
block, and these add up like sqrt(blocks): 0.7 to 2.7 eps sqrt(blocks) over 32 random blocks in
bf16 and float16. What is left out changes 1e-2 and more; in float32 that leaves room for a floor.
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

    def require_same(self, blocks: dict[int, Tensor], logits: Tensor | None) -> None:
        """Hold a bridge's run of the same tokens against this.

        Raises:  ContractError: they differ by more than rounding; with the first layer that does.
        """
        off = {
            layer: miss
            for layer, own in self.blocks.items()
            if layer in blocks and (miss := _miss(own, blocks[layer], layer)) > 1
        }
        if self.logits is not None and logits is not None:
            final = _miss(self.logits, logits, max(self.blocks, default=0) + 1)
            if not final > 1:
                return
            where = f"from block {min(off)} on" if off else "in its logits"
        elif off:
            final, where = max(off.values()), f"from block {min(off)} on"
        else:
            return
        way_out = ""
        if self.adapted:
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


@torch.no_grad()
def own_answer(model: Any, *, upto: int | None = None) -> OwnAnswer:
    """Run a few tokens through a transformers model as it is.

    Args:    upto: the last block to run; None = all of it.
    Raises:  ModelError: it cannot run.
    """
    name = type(model).__name__
    ids = probe_ids(model.config).to(model.get_input_embeddings().weight.device)
    blocks: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def note(module: nn.Module, args: Any, out: Any) -> None:
            blocks[layer] = (out[0] if isinstance(out, tuple) else out).detach().clone()
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
    return OwnAnswer(name, attention, is_adapted(model), ids, blocks, logits)


def probe_ids(config: Any) -> TokenIds:
    """Two rows that differ in their last token, longer than a short window of attention."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    windows = [getattr(config, name, None) for name in WINDOWS]
    short = [w for w in windows if isinstance(w, int) and 0 < w <= LONGEST_WINDOW]
    length = PROBE_TOKENS + (max(short) * 3 // 2 if short else 0)
    room = getattr(config, "max_position_embeddings", None) or getattr(config, "n_ctx", None)
    length = min(length, room) if isinstance(room, int) and room > 1 else length
    vocabulary = getattr(config, "vocab_size", None) or getattr(config, "d_vocab", 100)
    ids = (torch.arange(length)[None] + 3) % min(vocabulary, 100)
    return torch.cat([ids, torch.cat([ids[:, :-1], ids[:, :1]], dim=1)])


@contextmanager
def failing(what: str, *, hint: str = "") -> Iterator[None]:
    """One ModelError for whatever another library raises inside.

    Raises:  ModelError: what could not be done, and why.
    """
    try:
        yield
    except FAILS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(f"{what} ({_reason(error)}).{hint}") from None


def force_eager(model: Any) -> None:
    """Switch a transformers model to eager attention, where its class can be switched."""
    can = getattr(type(model), "_can_set_attn_implementation", None)
    if getattr(model.config, "_attn_implementation", "eager") != "eager" and can and can():
        model.set_attn_implementation("eager")


class _Enough(Exception):
    """Raised after the last block that was asked for."""


def _layers(model: Any) -> nn.ModuleList | list[nn.Module]:
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
    share = HALF_QUANTILE if eps > FLOOR else 1.0
    miss = each.flatten().float().quantile(share).item()
    return miss / max(FLOOR, ROUNDINGS * eps * math.sqrt(layer + 1)) if miss == miss else math.inf


def _reason(error: BaseException) -> str:
    """What a library complains of, on one line; where it says nothing, the line that failed."""
    said = " ".join(str(error).split())[:240]
    if said:
        return f"{type(error).__name__}: {said}"
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else f" in {trace.tb_frame.f_code.co_name}"
    return f"{type(error).__name__}{where}"
