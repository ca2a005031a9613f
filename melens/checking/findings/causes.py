"""What the model loses where one weight, one coordinate or one key is gone."""

from __future__ import annotations

from typing import Any

from melens.checking.findings.core import Card, Judgement, Unmeasured, View, nothing, rule
from melens.results import Evaluation, SuperWeights
from melens.results.evaluation import ConditionScore

NATS = "nats a token"


@rule(
    Card(
        id="super-weight",
        looks_for="a single weight whose loss ruins the model",
        unit=f"loss that zeroing one weight adds, {NATS}",
        needs=("super_weights",),
        why="Pruning, or rounding that clips this one weight, costs as much as a far worse model "
        "would; a bit flip in it does the same.",
        advice="Leave the named weight out of pruning, and keep it in 16 bits when quantising.",
    )
)
def super_weight(view: View, threshold: float) -> Judgement:
    """The costliest weight that makes a spike, removed alone (Yu et al.)."""
    found = view.held("super_weights", SuperWeights)
    if not found.super_weights:
        return nothing("no single weight makes a spike")
    at, worst = max(enumerate(found.super_weights), key=lambda pair: pair[1].loss_delta)
    where = f"layer {worst.layer} (counted from 0), down projection [{worst.row}, {worst.column}]"
    return Judgement(
        found=worst.loss_delta > threshold, value=worst.loss_delta,
        source=f"/results/super_weights/super_weights/{at}/loss_delta",
        title=f"zeroing one weight, {where}, adds {worst.loss_delta:.3g} {NATS}",
        evidence={"layer": worst.layer, "row": worst.row, "column": worst.column,
                  "weight": worst.value, **_interval(worst.interval),
                  "control": found.control.loss_delta if found.control else None},
        advice=f"Leave this weight out of pruning and keep it in 16 bits when quantising: {where}.",
    )  # fmt: skip


@rule(
    Card(
        id="one-token",
        looks_for="dependence on one coordinate of one token",
        unit=f"loss that zeroing the massive coordinate adds, {NATS}",
        needs=("edits",),
        why="One number of one token carries this much of the model. Whatever clips, rounds or "
        "clamps activations takes it away.",
        advice="Exempt the massive dimension from clipping and from activation quantisation; do "
        "not serve the model with clamped activations.",
    )
)
def one_token(view: View, threshold: float) -> Judgement:
    """The massive coordinate after the ME Layer set to 0 (Sun et al.)."""
    edits = view.held("edits", Evaluation)
    said = f"zeroing the massive coordinate after layer {edits.me_layer} (counted from 0)"
    return _judged(edits, edits.edited, "/results/edits/edited/delta/value", threshold, said)


@rule(
    Card(
        id="kv-eviction",
        looks_for="a cache eviction that would hit the sink",
        unit=f"loss that hiding the sink's key and value adds, {NATS}",
        needs=("edits",),
        why="A cache that evicts its oldest entries, or a window over it, hides exactly this key "
        "from every later token.",
        advice="Pin the first tokens in the cache (attention sinks), whatever is evicted.",
    )
)
def kv_eviction(view: View, threshold: float) -> Judgement | Unmeasured:
    """The massive token's key and value hidden in all layers after the ME Layer."""
    edits = view.held("edits", Evaluation)
    found = [(i, c) for i, c in enumerate(edits.rivals) if c.edit.name == "drop-key"]
    if not found:
        return Unmeasured("no layer after the ME Layer has attention to hide the key from")
    at, score = found[0]
    said = "hiding the massive token's key and value in the layers after the ME Layer"
    return _judged(edits, score, f"/results/edits/rivals/{at}/delta/value", threshold, said)


def _judged(
    edits: Evaluation, score: ConditionScore, source: str, threshold: float, said: str
) -> Judgement:
    assert score.delta is not None
    value = score.delta.value
    evidence: dict[str, Any] = {
        "loss": edits.base.value, "texts": edits.n, **_interval(score.delta.interval),
    }  # fmt: skip
    if edits.controls and edits.controls[0].delta is not None:
        evidence["control"] = edits.controls[0].delta.value
    return Judgement(
        found=value > threshold, value=value, source=source, evidence=evidence,
        title=f"{said} adds {value:.3g} {NATS}",
    )  # fmt: skip


def _interval(found: tuple[float, float] | None) -> dict[str, Any]:
    return {} if found is None else {"at_least_95": found[0], "at_most_95": found[1]}
