"""A scan, super weights and sinks against the published numbers of the same model."""

from __future__ import annotations

from melens.errors import ResultError
from melens.protocols import JsonObject
from melens.published.holding import (
    Held,
    checked,
    compared,
    fits_model,
    layer_compared,
    profile_layer,
)
from melens.published.record import known_models, profiles, published_profile, published_rows
from melens.results.known import Comparison, KnownCheck
from melens.results.scan import WeightScan
from melens.results.sinks import SINK_EPS, Sinks
from melens.results.super_weights import SuperWeights

SINK_TOLERANCE = 0.05
"""Of a published sink rate, absolute: it is of other texts, so a larger difference is unknown."""
CONVENTION = (
    "(layer, row, column): 0-based block, row = residual dimension, column = neuron, as in the "
    "checkpoint's down_proj.weight[row, column]."
)


def known_scan(model: str, scan: WeightScan, *, d_model: int | None = None) -> KnownCheck:
    """Hold a scan's predicted layers, dimensions and entries against what was published.

    A published number that the scan does not predict is a mismatch: weights do not depend on how
    a text begins. Sizes are left out, a ceiling is none.

    Args:    model: a row's name (``org/name``, or its last part, or a named model).
             d_model: as for :func:`melens.published.known`.
    """
    rows = [row for row in published_rows(model) if fits_model(row, scan.n_layers, d_model)]
    rows = [row for row in rows if _of_weights(row)]
    made = [item for row in rows for item in _scan_compared(row, scan)]
    sources = [row["source"] for row in rows]
    profile = published_profile(model)
    if profile is not None and fits_model(profile.model_dump(), scan.n_layers, d_model):
        about = {"source": profiles().source}
        made.append(profile_layer(profile, scan.me_layer, about))
        sources.append(about["source"])
    return checked(model, made, sources)


def _of_weights(row: JsonObject) -> bool:
    """Whether a row says anything that a scan predicts."""
    return any(key in row for key in ("me_layer", "steps", "dims", "erase_layer", "super_weights"))


def _scan_compared(row: JsonObject, scan: WeightScan) -> list[Comparison]:
    made = []
    layer = row["me_layer"] if "me_layer" in row else next(iter(row.get("steps", ())), None)
    hidden = layer is None and row["bos"] is False  # weights hold what only BOS shows
    if ("me_layer" in row or row.get("steps")) and not hidden:
        made.append(layer_compared("ME Layer", layer, scan.me_layer, row))
    for dim in map(int, row.get("dims", {})):
        fits = dim in scan.dims
        told = "predicted" if fits else "not predicted"
        made.append(compared(f"dimension {dim}", ("massive", told), row, fits=fits))
    if "erase_layer" in row:
        made.append(layer_compared("erase layer", row["erase_layer"], scan.erase_layer, row))
    entries = {found.at for found in scan.candidates}
    for layer, dim, neuron in row.get("super_weights", ()):
        fits = (layer, dim, neuron) in entries
        what = f"down_proj entry, layer {layer}, row {dim}, column {neuron}"
        told = "a candidate" if fits else "no candidate"
        made.append(compared(what, ("super weight", told), row, fits=fits))
    return made


def check_known(model: str) -> None:
    """Refuse a name without published super weights.

    Raises:  ResultError: naming those that have them.
    """
    if not any(row.get("super_weights") for row in published_rows(model)):
        names = [
            name
            for name, rows in known_models().items()
            if any(row.get("super_weights") for row in rows)
        ]
        raise ResultError(
            f"no super weights of {model!r} are on record; known: {', '.join(names)}."
        )


def hold_super_weights(model: str, result: SuperWeights) -> KnownCheck:
    """Hold found super weights against the published coordinates of ``model``.

    Args:    model: a row's name (``org/name``, or its last part, or a named model).
    Returns: a published coordinate that was found is a ``match``, one that was not a ``mismatch``,
             and a found one that is not on record ``unknown``; ``unknown`` as a whole where no
             coordinates are on record.
    """
    rows = [row for row in published_rows(model) if row.get("super_weights")]
    if not rows:
        return checked(model, (), (), convention=CONVENTION)
    published = {tuple(at): row["source"] for row in rows for at in row["super_weights"]}
    # Published coordinates name no expert: they are of dense FFNs.
    dense = [weight for weight in result.super_weights if weight.expert is None]
    found = {weight.at: f"found in pass {weight.found_in}" for weight in dense}
    made = [
        _compare_weight(
            at, "yes", found.get(at, "not found"), "match" if at in found else "mismatch", source
        )
        for at, source in published.items()
    ]
    made += [
        _compare_weight(at, "not on record", found[at], "unknown")
        for at in found
        if at not in published
    ]
    return checked(model, made, [row["source"] for row in rows], convention=CONVENTION)


def with_known(result: SuperWeights, model: str) -> SuperWeights:
    """The same result with that comparison in it."""
    return result.model_copy(update={"known": hold_super_weights(model, result)})


def _compare_weight(
    at: tuple[int, ...], published: str, measured: str, verdict: Held, source: str | None = None
) -> Comparison:
    return Comparison(
        what=f"super weight {at}",
        published=published,
        measured=measured,
        verdict=verdict,
        source=source,
    )


def hold_sinks(model: str, result: Sinks) -> KnownCheck:
    """Hold measured sinks against published rates and layers; other texts never contradict them.

    Args:    model: a row's name (``org/name``, or its last part, or a named model).
    """
    rows = [row for row in published_rows(model) if "sink_rate" in row or "sink_layers" in row]
    made = []
    for row in rows:
        if "sink_layers" in row:
            first = row["sink_layers"][0]
            made.append(layer_compared("first layer with sinks", first, result.onset_layer, row))
        rate = result.usual_rate
        if "sink_rate" in row and rate is not None:
            gap = rate - row["sink_rate"]
            fits = abs(gap) <= SINK_TOLERANCE
            off = None if fits else f"{100 * gap:+.0f} points"
            what = f"Sink_1 at eps {SINK_EPS:g} (T = {result.t}; published: 64)"
            shown = f"{row['sink_rate']:.1%}", f"{rate:.1%}"
            made.append(compared(what, shown, row, fits=fits, off=off))
    held = [
        one if one.verdict == "match" else one.model_copy(update={"verdict": "unknown"})
        for one in made
    ]
    return checked(model, held, [row["source"] for row in rows])
