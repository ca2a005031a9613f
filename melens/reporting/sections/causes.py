"""What makes the massive activation, and what edits of it cost."""

from __future__ import annotations

from melens.reporting.sections.base import Fact, PageBlock, PageView, Picture, Shown, Table, section
from melens.reporting.source import number_text
from melens.results.evaluation import Evaluation
from melens.results.isolate import Isolation
from melens.results.super_weights import SuperWeight, SuperWeights

CELLS = {
    "kept_kept": "as it is",
    "flat_kept": "norm gain flattened",
    "kept_edited": "FFN edited",
    "flat_edited": "both",
}


@section(
    "isolation",
    "What makes it",
    "The norm before the FFN and the FFN of one layer, each edited alone and both together, on the "
    "massive token only.",
    Isolation,
)
def isolation(view: PageView) -> PageBlock:
    """The 2 x 2, its neurons and the same edits elsewhere."""
    result: Isolation = view.result
    made = view.block()
    made.facts = [
        Fact("Edited layer (from 0)", view.number("/layer")),
        Fact("Massive dimension", view.number("/dim")),
        Fact("Massive coordinate", view.number("/coordinate")),
        Fact("Distinct inputs", view.number("/observations")),
        Fact("Norm edit", view.number("/factorial/norm")),
        Fact("FFN edit", view.number("/factorial/ffn_edit")),
    ]
    made.pictures = [
        Picture(
            result,
            "factorial",
            _factorial_alt(result),
            "The four cells; grey dots: the same edits at every other layer.",
        ),
        Picture(
            result,
            "layers",
            _layers_alt(result),
            "Every block's write dropped, put in alone, and the two edits at every layer.",
        ),
    ]
    made.tables = [
        _cells(view, "" if not i else f"/steps/{i - 1}", result.role(edited.layer))
        for i, edited in enumerate(result.edited)
    ]
    if result.neurons:
        made.tables.append(_neurons(view))
    if result.pruned_experts:
        made.tables.append(_pruned(view))
    made.notes = [*(row.sentence() for row in result.pruned_experts), *result.missing]
    return made


def _factorial_alt(result: Isolation) -> str:
    parts = []
    for key, name in CELLS.items():
        cell = getattr(result.factorial, key)
        left, sinks = (number_text(share, "percent") for share in (cell.left, cell.sink_rate))
        loss = number_text(cell.loss_delta, "signed")
        parts.append(f"{name}: {left} of the coordinate, sink rate {sinks}, loss {loss} nats")
    return "; ".join(parts) + "."


def _layers_alt(result: Isolation) -> str:
    text = "Share of the massive coordinate that is left without one block's write."
    for write in sorted(result.necessity, key=lambda write: abs(write.left))[:3]:
        text += f" {write.part} of layer {write.layer}: {number_text(write.left, 'percent')}."
    return f"{text} The other writes leave more. Layers count from 0."


def _cells(view: PageView, place: str, where: str) -> Table:
    rows = []
    for key, name in CELLS.items():
        at = f"{place}/factorial/{key}"
        rows.append(
            [
                name,
                view.number(f"{at}/coordinate"),
                view.number(f"{at}/left", "percent"),
                view.number(f"{at}/sink_rate", "percent"),
                view.number(f"{at}/loss_delta", "signed"),
                view.interval(f"{at}/loss_interval"),
            ]
        )
    return Table(
        f"Norm and FFN of {where}, kept and edited",
        (
            "cell",
            "coordinate",
            "share left",
            "sink rate",
            "loss change (nats a token)",
            "95 % interval",
        ),
        rows,
    )


def _pruned(view: PageView) -> Table:
    rows: list[list[Shown]] = []
    for i, damage in enumerate(view.result.pruned_experts):
        places = ["pruned", *(f"controls/{n}" for n in range(len(damage.controls)))]
        for place, row in zip(places, (damage.pruned, *damage.controls), strict=True):
            at = f"/pruned_experts/{i}/{place}"
            rows.append(
                [
                    f"{row.layer} / {row.expert}{'' if place == 'pruned' else ' (control)'}",
                    view.number(f"{at}/others", "percent"),
                    view.number(f"{at}/without/left", "percent"),
                    view.number(f"{at}/without/loss_delta", "signed"),
                    view.interval(f"{at}/without/loss_interval"),
                ]
            )
    return Table(
        "Experts pruned one at a time",
        (
            "layer (from 0) / expert",
            "ordinary tokens that go to it",
            "share of the coordinate left",
            "loss change (nats a token)",
            "95 % interval",
        ),
        rows,
    )


def _neurons(view: PageView) -> Table:
    rows = []
    for i, neuron in enumerate(view.result.neurons):
        at = f"/neurons/{i}"
        rows.append(
            [
                f"{neuron.layer} / {neuron.neuron}",
                view.number(f"{at}/share", "percent"),
                *view.numbers(at, "gate", "up", "product", "weight"),
                view.number(f"{at}/left", "percent"),
            ]
        )
    return Table(
        "Neurons that write the massive coordinate",
        (
            "layer (from 0) / neuron",
            "share of the layer's write",
            "gate",
            "up",
            "product",
            "down weight",
            "left without it",
        ),
        rows,
        folded=True,
    )


@section(
    "super-weights",
    "Super weights",
    "Single weights that make an activation spike. If one of them is rounded away or pruned, the "
    "model pays the loss below; only where that is more than the control is it a super weight.",
    SuperWeights,
)
def super_weights(view: PageView) -> PageBlock:
    """One row a weight, all together, and a control of the nearest size."""
    result: SuperWeights = view.result
    made = view.block()
    made.facts = [
        Fact("Loss, nothing removed (nats a token)", view.number("/base_loss")),
        Fact("Super weights found", number_text(len(result.supers))),
        Fact(
            "Large weights (they spike, and cost no more than the control)",
            number_text(len(result.large)),
        ),
    ]
    alt = f"{result.summary()} Left: largest FFN input and output by layer. Right: loss changes."
    made.pictures = [
        Picture(
            result,
            "spikes",
            alt,
            "How far each layer's FFN spikes, and what removing each weight costs.",
        )
    ]
    if result.super_weights:
        made.tables = [_weights(view)]
    made.notes = [f"Rule: {result.rule}.", *result.missing]
    return made


def _place(weight: SuperWeight, kind: str) -> str:
    of = "" if weight.expert is None else f" of expert {weight.expert}"
    return f"{weight.layer}, {weight.row}, {weight.column}{of} ({kind})"


def _weights(view: PageView) -> Table:
    rows: list[list[Shown]] = []
    for i, weight in enumerate(view.result.super_weights):
        at = f"/super_weights/{i}"
        rows.append(
            [
                _place(weight, view.result.kind_of(weight)),
                view.number(f"{at}/value"),
                view.number(f"{at}/share", "percent"),
                view.token(weight.token),
                view.number(f"{at}/loss_delta", "signed"),
                view.interval(f"{at}/interval"),
                view.number(f"{at}/neuron_loss_delta", "signed"),
            ]
        )
    for name, label in (("together", "all together"), ("control", "control: others of like size")):
        if getattr(view.result, name) is not None:
            rows.append(
                [
                    label,
                    "",
                    "",
                    "",
                    view.number(f"/{name}/loss_delta", "signed"),
                    view.interval(f"/{name}/interval"),
                    "",
                ]
            )
    return Table(
        "Each weight alone removed",
        (
            "layer (from 0), row, column",
            "value",
            "share of the spike",
            "at token",
            "loss change (nats a token)",
            "95 % interval",
            "whole neuron removed",
        ),
        rows,
    )


@section(
    "edits",
    "What edits of the massive activation cost",
    "The same texts with an edit and without it, paired. A control does as much to other places: "
    "an edit that does no more than its control has shown nothing.",
    Evaluation,
)
def edits(view: PageView) -> PageBlock:
    """Every condition of one evaluation."""
    result: Evaluation = view.result
    made = view.block()
    made.facts = [
        Fact("Task", view.number("/task")),
        Fact("Items", view.number("/n")),
        Fact(f"Without an edit ({result.unit})", view.number("/base/value")),
    ]
    made.pictures = [
        Picture(
            result,
            "dose",
            result.summary(),
            _caption(result),
        )
    ]
    made.tables = [_conditions(view)]
    made.notes = [result.about]
    return made


def _caption(result: Evaluation) -> str:
    """What the figure has: a curve only of several doses, bars only of known intervals."""
    said = "Difference to no edit, by dose and beside the controls"
    if not result.dose:
        said = "Difference to no edit" + ", beside its controls" * bool(result.controls)
    bars = any(c.delta is not None and c.delta.interval is not None for c in result.conditions)
    return said + ("; bars are 95 % intervals over items." if bars else ".")


def _conditions(view: PageView) -> Table:
    result: Evaluation = view.result
    masks = any(condition.energy is not None for condition in result.conditions)
    places = ["/base", "/edited"]
    for group in ("dose", "controls", "rivals"):
        places += [f"/{group}/{i}" for i in range(len(getattr(result, group)))]
    rows: list[list[Shown]] = []
    for at, condition in zip(places, result.conditions, strict=True):
        delta = condition.delta is not None
        energy = condition.energy is not None
        rows.append(
            [
                f"{condition.name} ({condition.edit.label})" if delta else "no edit",
                condition.role,
                view.number(f"{at}/value"),
                view.number(f"{at}/delta/value", "signed") if delta else "",
                view.interval(f"{at}/delta/interval") if delta else "",
                *([view.number(f"{at}/energy", "percent") if energy else ""] * masks),
            ]
        )
    return Table(
        f"Every condition, in {result.unit} ({'more' if result.higher_is_better else 'less'} is "
        "better)",
        (
            *("condition", "role", "value", "difference", "95 % interval"),
            *(["energy masked"] * masks),
        ),
        rows,
    )
