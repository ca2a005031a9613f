"""attention(): what chosen heads attend to in one text, as numbers to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from melens.batches import Batch
from melens.capture import stream
from melens.errors import CaptureError, SiteError
from melens.inputs import Inputs, Source, prepare
from melens.locating.search import locate_in
from melens.measuring.located import check_same_model, mark
from melens.models.anatomy import anatomy, check_layer, pattern_hook, resid_post
from melens.protocols import HookedModel, ModelLike
from melens.results import AttentionMaps, MELayer
from melens.results.attention import MOST_TOKENS, HeadMap, TokenNorms, most_heads
from melens.results.reading import HoldsMELayer, located_in

DIGITS = 4


@dataclass
class FirstSequence:
    """Reducer: the first sequence's tensor as it is; for one short text only."""

    kept: Tensor | None = None

    def update(self, x: Tensor, batch: Batch) -> None:
        """Keep the one sequence there is."""
        self.kept = x.detach()[0].float().cpu()

    def result(self) -> Tensor:
        """The kept tensor, without its batch axis."""
        if self.kept is None:
            raise CaptureError("FirstSequence saw no batch; pass it to stream() first.")
        return self.kept


def attention(
    model: ModelLike,
    me_layer: HoldsMELayer | None = None,
    prompts: Source = None,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> AttentionMaps:
    """Attention patterns of chosen layers and heads over the first of the texts.

    ``result.plot()`` draws them, ``result.view()`` gives circuitsvis views that work offline.

    Args:    model: anything ``melens.load`` takes.
             me_layer: what ``melens.locate`` found on this model; None = locate first.
             prompts: texts, as for ``melens.locate``; the first 128 tokens of the first one count.
             layers: which layers, counted from 0; None = the ME Layer and the one after it.
             heads: which query heads, counted from 0; None = as many as a page holds.
    Raises:  SiteError: a layer without attention, or a head the model does not have.
             PromptError, ModelError, ResultError: as ``describe``.
    """
    inputs = prepare(model, prompts)
    check_choice(inputs.model, layers, heads)
    found = located_in(me_layer) or locate_in(inputs)
    check_same_model(inputs, found)
    row = inputs.rows[0][:MOST_TOKENS]
    chosen = sorted(set(_telling_layers(inputs, found) if layers is None else layers))
    every = range(inputs.model.cfg.n_heads)
    fitting = max(1, most_heads(len(row)) // len(chosen))
    wanted = sorted(set(every[:fitting] if heads is None else heads))
    patterns = {layer: FirstSequence() for layer in chosen}
    resids = {layer: FirstSequence() for layer in chosen}
    taps = {pattern_hook(layer): tap for layer, tap in patterns.items()}
    taps |= {resid_post(layer): tap for layer, tap in resids.items()}
    stream(inputs.model, Batch.of(torch.tensor([row])), taps)
    sunk = {block.layer for block in anatomy(inputs.model).blocks if block.learned_sink}
    (marks,) = mark(inputs.over(Batch.of(torch.tensor([row]))), found)
    return AttentionMaps(
        tokens=tuple(map(inputs.decode, row)),
        me_layer=found.me_layer,
        massive_positions=tuple(marks[0].nonzero().flatten().tolist()),
        heads=tuple(
            _head(layer, head, patterns[layer].result()[head], learned=layer in sunk)
            for layer in chosen
            for head in wanted
        ),
        norms=tuple(
            TokenNorms(layer=layer, norms=tuple(tap.result().norm(dim=-1).tolist()))
            for layer, tap in resids.items()
        ),
        run=inputs.run_info(seed=found.run.seed, tokens_shown=len(row)),
    )


def check_choice(
    model: HookedModel, layers: Sequence[int] | None, heads: Sequence[int] | None
) -> None:
    """Refuse layers and heads that cannot be shown, before any work.

    Raises:  SiteError: naming the first one that does not fit.
    """
    parts = anatomy(model)
    able = parts.attention_layers
    if not able:
        raise SiteError(f"{parts.why_no_attention()}; so there is none to show.")
    for given in (layers, heads):
        if given is not None and not _whole_numbers(given):
            raise SiteError(f"layers and heads are lists of whole numbers, got {given!r}.")
    for layer in layers or ():
        check_layer(model, layer)
        if layer not in able:
            raise SiteError(f"{parts.why_no_attention(layer)}; these have: {list(able)}.")
    n_heads = model.cfg.n_heads
    if (layers is not None and not layers) or (heads is not None and not heads):
        raise SiteError("no layer or no head was given; leave the argument out for the default.")
    if bad := [head for head in heads or () if not 0 <= head < n_heads]:
        raise SiteError(f"head {bad[0]} is outside 0..{n_heads - 1}. Heads count from 0.")


def _whole_numbers(given: object) -> bool:
    return isinstance(given, Sequence) and all(type(value) is int for value in given)


def _telling_layers(inputs: Inputs, found: MELayer) -> list[int]:
    """The ME Layer and the next one, where sinks are expected to begin."""
    able = anatomy(inputs.model).attention_layers
    start = max(found.me_layer if found.me_layer is not None else 0, 0)
    return [layer for layer in able if layer >= start][:2] or list(able[-1:])


def _head(layer: int, head: int, pattern: Tensor, *, learned: bool) -> HeadMap:
    """One head; what a row lacks of 1 is what the learned sink took."""
    taken = (1 - pattern.double().sum(-1)).clamp_min(0).tolist() if learned else []
    return HeadMap(
        layer=layer,
        head=head,
        rows=_triangle(pattern),
        learned=tuple(round(share, DIGITS) for share in taken),
    )


def _triangle(pattern: Tensor) -> tuple[tuple[float, ...], ...]:
    """Row i up to key i, rounded."""
    rows = pattern.tolist()
    return tuple(
        tuple(round(value, DIGITS) for value in row[: i + 1]) for i, row in enumerate(rows)
    )
