"""Losses of the check's own texts under edits, paired text by text."""

from __future__ import annotations

from collections.abc import Sequence

from melens.checking.bench import Bench, Tick
from melens.errors import SiteError
from melens.evaluation.conditions import (
    BASE,
    Condition,
    check_held,
    check_unedited,
    conditions,
)
from melens.evaluation.forced import Forced, Runner
from melens.evaluation.rows import ItemRow, Rows
from melens.evaluation.scores import assembled
from melens.evaluation.settings import Bench as Trial
from melens.evaluation.settings import Card, Settings
from melens.evaluation.tasks import token_loss
from melens.models.decoder import decoder_of
from melens.results import Evaluation
from melens.results.edit import Edit
from melens.results.evaluation import NATS

ABOUT = (
    "Mean next-token loss of all tokens but each text's first, on the check's own texts; "
    "perplexity is its exponential."
)
MASK = Edit(name="wemask")
"""By gamma, rate 0.5, all layers after the ME Layer: what melens.evaluate takes by default."""


def edit_losses(bench: Bench, tick: Tick) -> Evaluation:
    """The massive coordinate zeroed, as many random ones instead, and the sink's key hidden."""
    zero = Edit(name="zero")
    made = [
        Condition("base", "base", BASE),
        Condition("edited", "edited", zero),
        Condition("random dims, seed 0", "control", zero.changed(select="random", seed=0)),
    ]
    after = bench.located.me_layer
    attends = decoder_of(bench.model).attentions
    if after is not None and any(layer > after for layer in attends):
        made.append(Condition("drop-key", "rival", Edit(name="drop-key")))
    return text_losses(bench, made, tick)


def dose_losses(bench: Bench, tick: Tick) -> Evaluation:
    """The mask's doses and both its controls.

    Raises:  SiteError: no attention after the ME Layer that a mask could act on.
    """
    after = bench.located.me_layer
    if after is None or not any(layer > after for layer in decoder_of(bench.model).attentions):
        raise SiteError("no layer after the ME Layer has attention, so there is nothing to mask.")
    return text_losses(bench, conditions(bench.model, MASK, bench.located), tick)


def text_losses(bench: Bench, tried: Sequence[Condition], tick: Tick) -> Evaluation:
    """Every text under every condition.

    Raises:  InterventionError: an edit is open on the model, or no text holds a massive token.
    """
    check_unedited(bench.model)
    rows = bench.inputs.rows
    held = check_held(bench.model, bench.located, rows)
    items = [
        Forced(str(i), tuple(row), (False, *[True] * (len(row) - 1)), {})
        for i, row in enumerate(rows)
    ]
    trial = Trial(bench.inputs, tuple(tried), bench.located, Settings())
    found = Rows(None, trial.facts(items=[list(item.ids) for item in items]))
    runner = Runner(bench.model, tried, bench.located)
    done = 0
    for batch in runner.batches(items):
        for name, foreseen in runner.outcome(batch, tried).found.items():
            for item, one in zip(batch, foreseen, strict=True):
                (value, weight), also = token_loss(item, one)
                found.add([ItemRow(item.id, name, value, weight, also)])
        done += len(batch)
        tick(done, len(items))
    card = Card("perplexity", NATS, higher_is_better=False, about=ABOUT, with_token=sum(held))
    return assembled(trial, card, found, [item.id for item in items])
