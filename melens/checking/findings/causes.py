"""What the model loses where one weight, one coordinate or one key is gone."""

from __future__ import annotations

from melens.checking.findings.core import Judgement, Measured, RuleCard, nothing, rule
from melens.protocols import JsonObject
from melens.results import Evaluation, MELayer, SuperWeights
from melens.results.evaluation import NATS


@rule(
    RuleCard(
        id="super-weight",
        looks_for="a single weight whose loss ruins the model",
        unit=f"loss that zeroing one weight adds, {NATS}",
        needs=("super_weights",),
        why="Zeroing this one weight, as pruning may, costs as much as a far worse model would. "
        "Rounding it is another matter, which the number formats of the check measure.",
        advice="Leave the named weight out of pruning.",
    )
)
def super_weight(view: Measured, threshold: float) -> Judgement:
    """The costliest weight that makes a spike, removed alone (Yu et al.).

    One whose removal costs no more than its control's is a large weight, and no finding.
    """
    found = view.held("super_weights", SuperWeights)
    if not found.super_weights:
        return nothing("no single weight makes a spike")
    at, worst = max(
        enumerate(found.super_weights),
        key=lambda pair: (found.is_super(pair[1]), pair[1].loss_delta),
    )
    of = "" if worst.expert is None else f"expert {worst.expert}'s "
    where = (
        f"layer {worst.layer} (counted from 0), {of}down projection [{worst.row}, {worst.column}]"
    )
    return Judgement(
        found=found.is_super(worst) and worst.loss_delta > threshold,
        value=worst.loss_delta,
        source=f"/results/super_weights/super_weights/{at}/loss_delta",
        title=f"zeroing one weight, {where}, adds {worst.loss_delta:.3g} {NATS}",
        evidence={
            "layer": worst.layer,
            **({} if worst.expert is None else {"expert": worst.expert}),
            "row": worst.row,
            "column": worst.column,
            "weight": worst.value,
            **_interval(worst.interval),
        },
        advice=f"Leave this weight out of pruning: {where}.",
    )


@rule(
    RuleCard(
        id="one-token",
        looks_for="dependence on one coordinate of one token",
        unit=f"loss that zeroing the massive coordinate adds, {NATS}",
        needs=("edits",),
        why="One number of one token carries this much of the model: this is what setting it to "
        "zero costs. What clipping, rounding or clamping it costs was not measured; the closer "
        "they bring it to zero, the closer they come to this.",
        advice="Exempt the massive dimension from clipping and from activation quantisation, or "
        "measure the loss with them before the model is served.",
    )
)
def one_token(view: Measured, threshold: float) -> Judgement:
    """The massive coordinate after the ME Layer set to 0 (Sun et al.)."""
    edits = view.held("edits", Evaluation)
    said = f"zeroing the massive coordinate after layer {edits.me_layer} (counted from 0)"
    found = _judged(edits, "/results/edits/edited/delta/value", threshold, said)
    control = edits.controls[0].delta if edits.controls else None
    if control is not None:
        found.evidence["control"] = control.value
    return found


@rule(
    RuleCard(
        id="kv-eviction",
        looks_for="a cache eviction that would hit the sink",
        unit=f"loss that evicting the massive token's key and value adds, {NATS}",
        needs=("eviction",),
        why="A cache that evicts this token's entries, as one that drops the oldest does where the "
        "token comes first, takes them from every later query in every layer. Here they are "
        "hidden from the middle of the texts on, and nothing else is; what evicting other entries "
        "with them costs was not measured.",
        advice="Pin the massive tokens' entries in the cache (attention sinks), whatever is "
        "evicted.",
    )
)
def kv_eviction(view: Measured, threshold: float) -> Judgement:
    """The massive token's key and value hidden in all layers, from the middle of the texts on."""
    found = view.held("eviction", Evaluation)
    start = found.edited.edit.start
    said = f"hiding the massive token's key and value in all layers from position {start} on"
    judged = _judged(found, "/results/eviction/edited/delta/value", threshold, said)
    located = view.held("locate", MELayer)
    judged.evidence["from_position"] = start
    judged.evidence["massive_at"] = located.massive[0].position if located.massive else None
    return judged


def _judged(edits: Evaluation, source: str, threshold: float, said: str) -> Judgement:
    """What the edit adds; its control is the rule's to name, if it has one."""
    assert edits.edited.delta is not None
    value = edits.edited.delta.value
    return Judgement(
        found=value > threshold,
        value=value,
        source=source,
        evidence={
            "loss": edits.base.value,
            "texts": edits.n,
            **_interval(edits.edited.delta.interval),
        },
        title=f"{said} adds {value:.3g} {NATS}",
    )


def _interval(found: tuple[float, float] | None) -> JsonObject:
    """The 95 % interval."""
    return {} if found is None else {"interval_low": found[0], "interval_high": found[1]}
