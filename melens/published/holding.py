"""A located ME Layer against the published numbers of the same model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from melens.errors import ResultError
from melens.formatting import counted
from melens.protocols import JsonObject
from melens.published.record import (
    PublishedProfile,
    meant,
    profiles,
    published_profile,
    published_rows,
)
from melens.results.base import Result
from melens.results.check import CheckReport
from melens.results.known import CONVENTION, Comparison, KnownCheck
from melens.results.locate import MELayer, last_body_layer
from melens.results.scan import WeightScan
from melens.results.sinks import Sinks
from melens.results.super_weights import SuperWeights

LEAST_TEXTS = 4
"""Texts without BOS from which on a missing massive token speaks against the model."""
VALUE_TOLERANCE = 0.15
"""Relative: published values are rounded to 3 digits, in bf16, and some checkpoints quantised."""
PLOT_TOLERANCE = 0.5
"""Relative, of a value that was read off a plot; a larger difference is unknown, no mismatch."""
SAME_ORDER = 10.0
"""Factor within which two maxima of other texts, 5,000 of them published, count as one order."""
ORDER = ("match", "mismatch", "unknown")
Held = Literal["match", "mismatch", "unknown"]


def known(model: str, result: Result, *, d_model: int | None = None) -> KnownCheck:
    """Hold a result against everything that was published about ``model``.

    Args:    model: a row's name (``org/name``, or its last part, or a named model).
             result: what ``locate``, ``scan``, ``super_weights``, ``sinks`` or ``check`` gave.
             d_model: the model's own width, where ``model`` may be just a folder's name: a row of
             another number of layers or another width is of another model, and left out.
    Returns: ``unknown`` where nothing is on record; a row without a layer compares what it has.
             Where numbers with and without BOS are on record, those of the run's own kind count.
             Sizes, stages and the erase layer depend on how a text begins: what does not fit is a
             mismatch only where both have BOS first, else unknown. A layer or dimension that does
             not fit is unknown where the published run was of the other kind, or where a few texts
             without BOS show no massive token. A size that was read off a plot, or is in doubt,
             never speaks against a run. ``off`` says by how much something does not fit.
    Raises:  ResultError: ``result`` is of another kind.
    """
    from melens.published.weights import hold_sinks, hold_super_weights, known_scan

    if isinstance(result, CheckReport):
        return _hold_report(model, result, d_model)
    if isinstance(result, WeightScan):
        return known_scan(model, result, d_model=d_model)
    if isinstance(result, SuperWeights):
        return hold_super_weights(model, result)
    if isinstance(result, Sinks):
        return hold_sinks(model, result)
    if not isinstance(result, MELayer):
        raise ResultError(
            "known() needs a locate result, a scan, super weights, sinks or a check's report, got "
            f"{type(result).__name__}."
        )
    return _hold_located(model, result, d_model)


def _hold_located(model: str, result: MELayer, d_model: int | None) -> KnownCheck:
    rows = [row for row in published_rows(model) if fits_model(row, result.n_layers, d_model)]
    with_bos = result.run.settings.get("bos_first")  # None: some texts, or an old result is silent
    if with_bos is not None:
        rows = [row for row in rows if row["bos"] in (None, with_bos)] or rows
    made = [item for row in rows for item in _compared(row, result)]
    sources = [row["source"] for row in rows]
    profile = published_profile(model)
    if profile is not None and fits_model(profile.model_dump(), result.n_layers, d_model):
        made += _profile_compared(profile, result)
        sources.append(profiles().source)
    start = with_bos if isinstance(with_bos, bool) else None
    return checked(model, made, sources, bos_first=start)


def checked(
    model: str,
    made: Iterable[Comparison],
    sources: Sequence[str],
    *,
    bos_first: bool | None = None,
    convention: str = CONVENTION,
) -> KnownCheck:
    """The check of all comparisons; the same one of several sources is one."""
    held = merged(made)
    if not sources:
        named = bool(published_rows(model)) or published_profile(model) is not None
        return KnownCheck(
            model=model,
            verdict="unknown",
            comparisons=(),
            source=None,
            meant=None if named else meant(model),
            named=named,
            bos_first=bos_first,
            convention=convention,
        )
    found = {item.verdict for item in held}
    verdict = "mismatch" if "mismatch" in found else "match" if "match" in found else "unknown"
    said = "; ".join(dict.fromkeys(name for source in sources for name in source.split("; ")))
    return KnownCheck(
        model=model,
        verdict=verdict,
        comparisons=held,
        source=said,
        bos_first=bos_first,
        convention=convention,
    )


def merged(made: Iterable[Comparison]) -> tuple[Comparison, ...]:
    """Comparisons of equal numbers as one, with all its sources and the best verdict."""
    kept: dict[tuple[str, str, str], Comparison] = {}
    for item in made:
        key = (item.what, item.published, item.measured)
        if key not in kept:
            kept[key] = item
            continue
        first = kept[key]
        best = min((first, item), key=lambda one: ORDER.index(one.verdict))
        both = "; ".join(dict.fromkeys(filter(None, (first.source, item.source))))
        kept[key] = best.model_copy(update={"source": both})
    return tuple(kept.values())


def known_by(names: Iterable[str], hold: Callable[[str], KnownCheck]) -> KnownCheck:
    """The check of the first of several names that is on record; of the first name if none is.

    Args:    names: what a model is called, and what its files say that it is called.
             hold: the check of one name.
    """
    checks = [hold(name) for name in names]
    return next((check for check in checks if check.source is not None), checks[0])


def fits_model(row: JsonObject, n_layers: int, d_model: int | None) -> bool:
    """Whether a model of this size can be the published one; None = taken at its word."""
    return d_model is None or (row["n_layers"], row["d_model"]) == (n_layers, d_model)


def _hold_report(model: str, report: CheckReport, d_model: int | None) -> KnownCheck:
    """Every stage of a check that something is published about."""
    kinds = (MELayer, SuperWeights, Sinks)
    parts = [known(model, report.located(), d_model=d_model)]
    for stage in report.results:
        found = report.result(stage)
        if isinstance(found, kinds) and not isinstance(found, MELayer):
            parts.append(known(model, found))
    sources = [part.source for part in parts if part.source is not None]
    made = [item for part in parts for item in part.comparisons]
    return checked(model, made, sources, bos_first=parts[0].bos_first)


def _compared(row: JsonObject, result: MELayer) -> list[Comparison]:
    made = [_layer(row, result), _jump(row, result), *_dims(row, result)]
    made += [_erase(row, result), _stages(row, result)]
    sure = {True: _same_kind(row, result), False: _same_start(row, result)}
    return [
        item
        if item.verdict == "match" or sure[item.place]
        else item.model_copy(update={"verdict": "unknown"})
        for item in made
        if item is not None
    ]


def _same_kind(row: JsonObject, result: MELayer) -> bool:
    """Whether a layer or a dimension of this run can speak against the published one."""
    with_bos = result.run.settings.get("bos_first")
    shown = bool(result.massive) or bool(with_bos) or result.stability.sequences >= LEAST_TEXTS
    return row["bos"] in (None, with_bos) and shown


def _same_start(row: JsonObject, result: MELayer) -> bool:
    """Whether both runs begin with BOS and nothing else is massive first: the same token."""
    with_bos = bool(result.run.settings.get("bos_first"))
    first = bool(result.massive) and result.massive[0].position == 0
    certain = row["exactness"] != "plot" and not row.get("doubt") and not row.get("position")
    return row["bos"] is True and with_bos and first and certain


def _layer(row: JsonObject, result: MELayer) -> Comparison | None:
    measured = result.me_layer
    if "me_layer" in row:
        return layer_compared("ME Layer", row["me_layer"], measured, row, place=True)
    if steps := row.get("steps"):
        made = layer_compared("first of the steps", steps[0], measured, row, place=True)
        return made.model_copy(update={"published": _show(steps)})
    return None


def layer_compared(
    what: str, published: int | None, measured: int | None, row: JsonObject, *, place: bool = False
) -> Comparison:
    """Two layers, and how many lie between them."""
    off = None
    if published != measured and None not in (published, measured):
        gap = int(measured or 0) - int(published or 0)
        off = f"{counted(abs(gap), 'layer')} {'later' if gap > 0 else 'earlier'}"
    made = compared(
        what, (published, measured), row, fits=published == measured, place=place, off=off
    )
    doubtful = row.get("layer_in_doubt") and made.verdict == "mismatch"
    return unsure(made) if doubtful else made


def _dims(row: JsonObject, result: MELayer) -> list[Comparison]:
    """Whether each published dimension is massive, and how large it is where it is."""
    first = result.massive[0] if result.massive else None
    largest = {
        token.dim: abs(token.value)
        for token in result.massive
        if first and (token.position, token.token_id) == (first.position, first.token_id)
    }
    made = []
    for dim, value in row.get("dims", {}).items():
        found = largest.get(int(dim))
        shown = "not massive" if found is None else "massive"
        fits = found is not None
        made.append(compared(f"dimension {dim}", ("massive", shown), row, fits=fits, place=True))
        if found is not None:
            made.append(size_compared(f"|x| in dimension {dim}", abs(value), found, row))
    return made


def size_compared(what: str, published: float, measured: float, row: JsonObject) -> Comparison:
    """Two sizes, and the difference in percent where they do not fit."""
    tolerance = PLOT_TOLERANCE if row["exactness"] == "plot" else VALUE_TOLERANCE
    fits = abs(measured - published) <= tolerance * published
    off = None if fits else percent_off(published, measured)
    return compared(what, (f"{published:,.0f}", f"{measured:,.0f}"), row, fits=fits, off=off)


def percent_off(published: float, measured: float) -> str:
    """How much larger or smaller, in percent; from three times on as a factor."""
    if measured >= 3 * published > 0:
        return f"{measured / published:.1f} x as large"
    change = 100 * (measured - published) / published if published else 0.0
    return f"{abs(change):.0f} % {'larger' if change > 0 else 'smaller'}"


def _jump(row: JsonObject, result: MELayer) -> Comparison | None:
    """The largest |x| that the ME Layer leaves."""
    if "jump" not in row or not result.me_layer or result.me_layer < 0:
        return None
    found = result.profile[result.me_layer].max
    return size_compared("max |x| after the ME Layer", row["jump"][1], found, row)


def _erase(row: JsonObject, result: MELayer) -> Comparison | None:
    if "erase_layer" not in row:
        return None
    return layer_compared("erase layer", row["erase_layer"], result.erase_layer, row)


def _stages(row: JsonObject, result: MELayer) -> Comparison | None:
    if "stages" not in row:
        return None
    published = [layer for layer, _ in row["stages"]]
    measured = [stage.layer for stage in result.stages]
    fits = published == measured
    return compared("stages at layers", (published, measured), row, fits=fits)


def _profile_compared(profile: PublishedProfile, result: MELayer) -> list[Comparison]:
    """The layer of the first large step, and the order of size: all that other texts allow."""
    about = {"source": profiles().source, "bos": profiles().bos, "exactness": "exact"}
    made = [profile_layer(profile, result.me_layer, about)]
    if not _same_kind(about, result):
        made = [one if one.verdict == "match" else unsure(one) for one in made]
    body = result.profile[: last_body_layer(result.n_layers) + 1]
    here, there = max(row.max for row in body), profile.answer().peak
    fits = there > 0 and 1 / SAME_ORDER <= here / there <= SAME_ORDER
    size = compared(
        "largest |x|, order of size (published: over 5,000 texts)",
        (f"{there:,.4g}", f"{here:,.4g}"),
        about,
        fits=fits,
        off=None if fits else percent_off(there, here),
    )
    return [*made, size if fits else unsure(size)]


def profile_layer(profile: PublishedProfile, measured: int | None, row: JsonObject) -> Comparison:
    """The ME Layer that the criteria name on a published profile, beside this run's.

    Only a profile with one or a few clear steps can speak against a run: of its maxima nobody
    knows the token.
    """
    found = profile.answer()
    what = f"ME Layer by the published profile ({found.verdict})"
    made = layer_compared(what, found.me_layer, measured, row, place=True)
    clear = found.verdict in ("single", "multi-step")
    if made.verdict == "mismatch" and (not clear or measured in found.steps):
        return unsure(made)
    return made


def unsure(item: Comparison) -> Comparison:
    """The same, as no evidence against the model."""
    return item.model_copy(update={"verdict": "unknown"})


def compared(
    what: str,
    numbers: tuple[object, object],
    row: JsonObject,
    *,
    fits: bool,
    place: bool = False,
    off: str | None = None,
) -> Comparison:
    """One comparison, with the row's source; ``numbers``: the published one, the measured one."""
    published, measured = numbers
    return Comparison(
        what=what,
        published=_show(published),
        measured=_show(measured),
        verdict="match" if fits else "mismatch",
        place=place,
        off=off,
        source=row["source"],
    )


def _show(value: object) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
