"""The tables of an isolation and of super weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from melens.cli.listing import Listing, cell, rest, table_of
from melens.cli.tables.measures import held_listings
from melens.formatting import interval_text, with_interval
from melens.protocols import JsonObject
from melens.results.isolate import cells

if TYPE_CHECKING:
    from melens.results.isolate import EditedLayer, ExpertDamage, Interaction, Isolation
    from melens.results.patch import PatchGrid
    from melens.results.super_weights import LayerSpikes, Removal, SuperWeight, SuperWeights

LISTED = 12

MOST_MISSING = 4


MOST_NEURONS = 4
"""Neurons a layer that the table lists; the JSON has more."""


@table_of("isolate")
def _isolate(result: Isolation) -> Iterator[Listing]:
    yield Listing(
        f"Edits on the massive tokens of {result.sequences_massive} of {result.sequences} "
        f"sequences ({result.observations} distinct up to the token); sinks over layers after "
        f"{result.me_layer}, losses in nats."
    )
    for edited in result.edited:
        yield from _edited_layer(result, edited)
    own = "" if result.ordinary is None else f" (which has {result.ordinary:z.1%} by itself)"
    yield Listing(
        "\nShare of the coordinate left without a block's write, and made by that write put into "
        f"an ordinary token{own}:",
        _writes(result),
    )
    if result.decompositions:
        rows = _neurons(result)
        yield Listing("\nNeurons (share of their layer's write into the massive dimension):", rows)
        yield from rest(len(rows), len(result.neurons), "neurons that were looked at")
    if result.experts:
        yield Listing(
            "\nExperts of the massive token (shares of their layer's write into the massive "
            "dimension; others: ordinary tokens routed there too):",
            [row.model_dump() for row in result.experts],
        )
        names = ", ".join(f"layer {n} expert {e}" for n, e in result.experts_to_protect)
        yield Listing(f"To protect: {names or 'none makes a tenth of its layer'}")
    if result.pruned_experts:
        yield Listing(
            "\nOne expert pruned at every token (its router weight goes to no other); controls: "
            "others whose share of ordinary tokens is nearest:",
            [row for damage in result.pruned_experts for row in _pruned(damage)],
        )
    for damage in result.pruned_experts:
        yield Listing(damage.sentence())
    for line in result.missing:
        yield Listing(f"Not there: {line}")
    yield Listing("")


def _pruned(damage: ExpertDamage) -> list[JsonObject]:
    return [
        {
            "": "control" if i else "pruned",
            "layer": row.layer,
            "expert": row.expert,
            "ordinary tokens": f"{row.others:.1%}",
            "coordinate left": f"{row.without.left:z.1%}",
            "loss": row.without.loss,
            "change": f"{row.without.loss_delta:+.4f}",
            "95 %": interval_text(row.without.loss_interval, "+.4f"),
        }
        for i, row in enumerate((damage.pruned, *damage.controls))
    ]


def _edited_layer(result: Isolation, edited: EditedLayer) -> Iterator[Listing]:
    f = edited.factorial
    yield Listing(
        f"\nNorm ({f.norm}) x FFN ({f.ffn_edit}) at {result.role(edited.layer)}:",
        [_cell(row) for row in cells(f)],
    )
    yield Listing(_interaction(f.interaction))
    yield Listing(
        f"\nGrowth through the FFN branch of layer {edited.layer} (norms):",
        [step.model_dump() for step in edited.path],
    )
    for line in (_direction(edited), *_norms(edited), *_controls(edited)):
        if line:
            yield Listing(line)


def _cell(row: JsonObject) -> JsonObject:
    return {
        "norm": row["norm"],
        "FFN": row["ffn"],
        "coordinate": row["coordinate"],
        "left": row["left"],
        "sinks > 0.3": row["sink_rate"],
        "loss": row["loss"],
        "change": row["loss_delta"],
        "95 %": interval_text(row["loss_interval"], "+.4f"),
    }


def _interaction(found: Interaction) -> str:
    log = "-" if found.log_coordinate is None else f"{found.log_coordinate:+.3f}"
    return (
        f"Interaction: {log} in ln |coordinate| (0 = the edits multiply), "
        f"{found.coordinate:+,.0f} on the additive scale, {found.sink_rate:+.3f} in sinks, "
        f"{found.loss:+.4f} nats ({interval_text(found.loss_interval, '+.4f')})."
    )


def _writes(result: Isolation) -> list[JsonObject]:
    rows: dict[int, JsonObject] = {}
    for name, writes in (("without", result.necessity), ("put in", result.sufficiency)):
        for write in writes:
            rows.setdefault(write.layer, {"layer": write.layer})[f"{name} {write.part}"] = (
                write.left
            )
    names = [f"{name} {part}" for name in ("without", "put in") for part in ("attention", "ffn")]
    return [{"layer": n} | {name: row.get(name) for name in names} for n, row in rows.items()]


def _neurons(result: Isolation) -> list[JsonObject]:
    rows = []
    for found in result.decompositions:
        here = [neuron for neuron in result.neurons if neuron.layer == found.layer]
        for i, neuron in enumerate(here[:MOST_NEURONS]):
            needed = ", ".join(
                f"{n} for {100 * float(t):g} %" for t, n in found.neurons_for.items()
            )
            rows.append(
                {
                    "layer": neuron.layer,
                    "neuron": neuron.neuron,
                    "share": neuron.share,
                    "left without": neuron.left,
                    "gate": neuron.gate,
                    "up": neuron.up,
                    "weight": neuron.weight,
                    "layer writes": found.written if not i else None,
                    "needed": "" if i else needed,
                }
            )
    return rows


def _direction(result: EditedLayer) -> str | None:
    d = result.direction
    if d is None:
        return None
    return (
        f"\nInput direction ({d.kind} form, {d.concentration:.0%} of it in one direction): "
        f"|cosine| {d.massive:.2f} for the massive token, {d.others_median:.3f} (at most "
        f"{d.others_max:.2f}) for others; it alone predicts {d.explained:.0%} of the write."
    )


def _norms(result: EditedLayer) -> list[str]:
    return [
        f"{row.norm}: flat leaves {row.flat:z.1%}, half-way {row.half:z.1%}, all gains 1 "
        f"{row.ones:z.0%}, shuffled {min(row.shuffled):.0%} to {max(row.shuffled):.0%}."
        for row in result.norms
    ]


def _controls(result: EditedLayer) -> list[str]:
    lines = []
    for name, label in (("flat", "a flat norm"), ("edited", "the FFN edit")):
        cells = [(c.layer, getattr(c, name)) for c in result.controls.layers]
        cells = [(n, cell) for n, cell in cells if cell is not None]
        if cells:
            n, least = min(cells, key=lambda item: abs(item[1].left))
            m, most = max(cells, key=lambda item: item[1].loss_delta)
            lines.append(
                f"Control, {label} at every other layer: least left {least.left:z.0%} (layer {n}), "
                f"largest loss change {most.loss_delta:+.4f} (layer {m})."
            )
    if drawn := result.controls.neurons:
        lines.append(
            f"Control, as many random neurons: {min(drawn):.1%} to {max(drawn):.1%} left "
            f"({len(drawn)} draws)."
        )
    return lines


SITES = {"output": "output", "write": "after the norm"}


@table_of("super-weights")
def _super_weights(result: SuperWeights) -> Iterator[Listing]:
    routed = any(row.expert is not None for row in result.profile)
    yield Listing(
        "Where the FFN stands out (largest |x|; in brackets, times the layer's median):",
        [_layer(row, routed) for row in result.profile],
        optional=("position", "token"),
    )
    for line in result.missing:
        yield Listing(f"Not looked at: {line}")
    yield Listing(
        "\nRule: one weight makes most of a spike that stands out in its layer and among layers "
        "(in full: --explain)."
    )
    together, control = result.together, result.control
    if together is not None and control is not None:  # where one was found
        yield Listing(
            f"\nRemoved one at a time; mean loss without any removed {result.base_loss:.4f} nats a "
            "token, differences paired by sequence, 95 % bootstrap:",
            [{"": result.kind_of(w), **_weight(w, routed)} for w in result.super_weights],
            optional=("pass", "position", "token"),
        )
        for name, group in (("All together", together), ("Control", control)):
            yield Listing(f"{name}: {with_interval(group.loss_delta, group.interval, '+.4f')}")
        yield Listing(f"Control removed instead: {_control(control)}")
    if result.known is not None and result.known.comparisons:
        yield from held_listings(result.known, "\nPublished coordinates:")
    yield Listing("")


def _layer(row: LayerSpikes, routed: bool) -> JsonObject:
    made = _block(row, routed) | {
        "input": _times(row.input, row.input_median),
        "output": _times(row.output, row.output_median),
    }
    if row.write is not None:
        made["after the norm"] = _times(row.write, row.write_median)
    return made | {
        "row": row.row,
        "column": row.column,
        "position": row.position,
        "token": repr(row.token),
        "one weight's share": round(row.share, 3),
        "": row.verdict,
    }


def _block(row: LayerSpikes | SuperWeight, routed: bool) -> JsonObject:
    """The layer, and the expert where any row of the table has one."""
    return {"layer": row.layer, **({"expert": row.expert} if routed else {})}


def _weight(weight: SuperWeight, routed: bool) -> JsonObject:
    return _block(weight, routed) | {
        "row": weight.row,
        "column": weight.column,
        "value": weight.value,
        "pass": weight.found_in,
        "spikes at": SITES[weight.site],
        "share": round(weight.share, 3),
        "position": weight.position,
        "token": repr(weight.token),
        "role": weight.role,
        "loss change": with_interval(weight.loss_delta, weight.interval, "+.4f"),
        "whole neuron": f"{weight.neuron_loss_delta:+.4f}",
    }


def _control(group: Removal) -> str:
    experts = group.experts or (None,) * len(group.weights)
    rows = zip(group.weights, experts, group.values, strict=True)
    return ", ".join(
        f"({', '.join(map(str, at))}{'' if n is None else f' of expert {n}'}) of {value:.3g}"
        for at, n, value in rows
    )


def _times(value: float, median: float | None) -> str:
    return f"{cell(value)} ({value / median:,.0f} x)" if median else f"{cell(value)} (median 0)"


@table_of("patch")
def _patch(result: PatchGrid) -> Iterator[Listing]:
    rows = result.shown(LISTED)
    yield Listing(f"{result.metric}: {result.metric_about}")
    yield Listing(
        f"The {len(rows)} of {len(result.rows())} patched runs that change it most:",
        [
            {name: repr(value) if name == "token" else value for name, value in row.items()}
            for row in rows
        ],
    )
    for line in result.missing[:MOST_MISSING]:
        yield Listing(line)
    yield from rest(MOST_MISSING, len(result.missing), "reasons why something is not there")
