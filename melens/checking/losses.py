"""What only a check measures: losses of its texts under edits, sizes of cached keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from melens.batches import Batch
from melens.capture import stream
from melens.checking.bench import Bench
from melens.errors import PromptError, SiteError
from melens.evaluating.edits import (
    BASE,
    EditCondition,
    check_unedited,
    conditions,
)
from melens.evaluating.forced import Forced, ItemOutcome
from melens.evaluating.runner import rows_of_items
from melens.evaluating.scores import Setup, TaskCard, assembled, held_facts
from melens.evaluating.tasks import token_loss
from melens.inputs import Inputs
from melens.item_rows import ItemRow
from melens.measuring.located import settle
from melens.models.anatomy import anatomy
from melens.models.attention import HeadView, attention_sites
from melens.models.decoder import decoder_of
from melens.results import Evaluation, MELayer
from melens.results.check import CacheNorms, CacheRow
from melens.results.edit import Edit
from melens.results.evaluation import NATS
from melens.settings import Progress, Run

KEYS = ("rot_k", "k_norm", "k")
"""Where keys can be read, the closest to what a cache keeps first."""


class _Largest:
    """Reducer: a token's largest |entry| by head, massive tokens apart from the others."""

    def __init__(self, view: HeadView, heavy: Sequence[Tensor]) -> None:
        self.view, self.heavy, self.seen = view, heavy, 0
        self.token: list[Tensor] = []
        self.others: list[Tensor] = []

    def update(self, x: Tensor, batch: Batch) -> None:
        """Take in one batch; the marks are those of the same batch."""
        sizes = self.view.by_head(x.detach()).float().abs().amax(-1).cpu()
        heavy = self.heavy[self.seen].cpu()
        self.seen += 1
        for row, marks, real in zip(sizes, heavy, batch.mask.cpu(), strict=True):
            if marks.any() and (real & ~marks).any():
                self.token.append(row[:, marks].amax(-1))
                self.others.append(row[:, real & ~marks].median(-1).values)

    def result(self) -> CacheRow | None:
        """The head with the largest ratio; None where no text holds a massive token."""
        if not self.token:
            return None
        token = torch.stack(self.token).amax(0)
        others = torch.stack(self.others).double().mean(0)
        ratios = torch.where(others > 0, token / others.clamp_min(1e-300), torch.zeros(()).double())
        head = int(ratios.argmax())
        return CacheRow(
            layer=self.view.layer,
            site=self.view.site,  # type: ignore[arg-type]
            head=head,
            token=float(token[head]),
            others=float(others[head]),
            ratio=float(ratios[head]),
        )


def cache_norms(
    inputs: Inputs, me_layer: MELayer, *, progress: Progress | None = None
) -> CacheNorms:
    """One pass over the texts; keys where the cache keeps them, and values.

    Raises:  ResultError: ``me_layer`` is of other weights.
    """
    located = settle(inputs, me_layer)
    sites = attention_sites(inputs.model)
    taps: dict[str, _Largest] = {}
    for layer in range(me_layer.n_layers):
        held = {view.site: view for view in sites.layer(layer)}
        key = next((held[site] for site in KEYS if site in held), None)
        for view in (key, held.get("v")):
            if view is not None:
                taps[view.hook] = _Largest(view, located.heavy)
    if taps:
        stream(inputs.model, inputs.batches, taps, progress=inputs.ticker(progress))
    rows = [tap.result() for tap in taps.values()]
    return CacheNorms(
        me_layer=me_layer.me_layer,
        n_layers=me_layer.n_layers,
        rows=tuple(row for row in rows if row is not None),
        missing=sites.missing,
        run=inputs.run_info(seed=me_layer.run.seed),
    )


ABOUT = (
    "Mean next-token loss of all tokens but each text's first, on the check's own texts; "
    "perplexity is its exponential."
)
LATE = (
    "Mean next-token loss of what positions from {start} on foresee, on the check's own texts; "
    "queries before see the key that those from there on miss, in every layer."
)
LEAST_HALF = 2
"""Tokens before the eviction: the massive token, and one more at least."""
MASK = Edit(name="wemask")
"""By gamma, rate 0.5, all layers after the ME Layer: what melens.evaluate takes by default."""


def edit_losses(bench: Bench, tick: Progress) -> Evaluation:
    """The massive coordinate zeroed, and as many random ones instead."""
    zero = Edit(name="zero")
    made = [
        EditCondition("base", "base", BASE),
        EditCondition("edited", "edited", zero),
        EditCondition("random dims, seed 0", "control", zero.changed(select="random", seed=0)),
    ]
    return text_losses(bench, made, tick)


def eviction_losses(bench: Bench, tick: Progress) -> Evaluation:
    """The massive token's key hidden in all layers, from the middle of the texts on.

    What comes before has seen it, as before a cache evicts it; only tokens foreseen without it
    are scored. Of the entries that a cache evicts it is the only one that is hidden here.

    Raises:  PromptError: no text is long enough. SiteError: no layer has attention.
    """
    layers = tuple(decoder_of(bench.model).attentions)
    if not layers:
        why = anatomy(bench.model).why_no_attention()
        raise SiteError(f"{why}; so no key can be hidden as a cache that evicts it would.")
    start = min(len(row) for row in bench.inputs.rows) // 2
    if start < LEAST_HALF:
        raise PromptError(
            f"the shortest text has {2 * start} tokens; half of it is too little to evict from."
        )
    made = [
        EditCondition("base", "base", BASE),
        EditCondition("edited", "edited", Edit(name="drop-key", layers=layers, start=start)),
    ]
    return text_losses(bench, made, tick, start=start)


def dose_losses(bench: Bench, tick: Progress) -> Evaluation:
    """The mask's doses and both its controls.

    Raises:  SiteError: no attention after the ME Layer that a mask could act on.
    """
    after = bench.located.me_layer
    if after is None or not any(layer > after for layer in decoder_of(bench.model).attentions):
        raise SiteError("no layer after the ME Layer has attention, so there is nothing to mask.")
    return text_losses(bench, conditions(bench.model, MASK, bench.located), tick)


def text_losses(
    bench: Bench, tried: Sequence[EditCondition], tick: Progress, *, start: int = 0
) -> Evaluation:
    """Every text under every condition, scored on tokens that positions from ``start`` foresee.

    Raises:  InterventionError: an edit is open on the model, or no text holds a massive token.
    """
    check_unedited(bench.model)
    items = [
        Forced.scored_from(start + 1, str(i), row, {}) for i, row in enumerate(bench.inputs.rows)
    ]
    trial = Setup(bench.inputs, tuple(tried), bench.located, Run(progress=tick))
    facts = {"items": [list(item.ids) for item in items]}
    found = rows_of_items(trial, items, _row, facts)
    about = ABOUT if not start else LATE.format(start=start)
    card = TaskCard("perplexity", NATS, higher_is_better=False, about=about)
    return assembled(trial, card, found, [item.id for item in items])


def _row(one: ItemOutcome) -> ItemRow:
    (value, weight), also = token_loss(one.item, one.found)
    about = held_facts(one.massive) if one.condition == "base" else {}
    return ItemRow(one.item.id, one.condition, value, weight, also, about)
