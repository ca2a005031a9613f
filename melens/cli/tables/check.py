"""The tables of a check, and of the one measurement that only a check makes."""

from __future__ import annotations

from collections.abc import Iterator

from melens.cli.listing import Listing, cell, table_of
from melens.protocols import JsonObject
from melens.results.check import CacheNorms, CheckReport, RuleOutcome
from melens.results.diff import Change, Difference, SideInfo, SideRow

NOTHING = "nothing"
"""In place of "ok" where a rule passed because there was nothing to measure."""
SIGNS = {"passed": "ok", "found": "FOUND", "not measured": "-", "off": "off"}


@table_of("check")
def _check(result: CheckReport) -> Iterator[Listing]:
    grave = {finding.id: finding.severity for finding in result.findings}
    yield Listing(
        f"Rules of the policy '{result.policy.name}' (layers count from 0):",
        [
            {
                "rule": rule.id,
                "": _sign(rule),
                "severity": grave.get(rule.id, ""),
                "value": cell(rule.value),
                "threshold": cell(rule.threshold),
                "unit": rule.unit,
            }
            for rule in result.rules
        ],
    )
    for rule in result.rules:
        if rule.status == "not measured":
            yield Listing(f"{rule.id}: not measured, {rule.reason}")
    for finding in result.findings:
        yield Listing(f"\n{finding.severity.upper()} {finding.id}: {finding.title}.")
        yield Listing(f"  Why: {finding.why}")
        yield Listing(f"  What to do: {finding.advice}")
    for stage in result.stages:
        if stage.status == "failed":
            yield Listing(f"\nStage {stage.name} could not run: {stage.reason}")
    if result.recommendation is not None:
        yield Listing(f"\nRecommendation: {result.recommendation.text}")
    yield Listing("")


def _sign(rule: RuleOutcome) -> str:
    empty = rule.status == "passed" and rule.value is None
    return NOTHING if empty else SIGNS[rule.status]


@table_of("cache-norms")
def _cache_norms(result: CacheNorms) -> Iterator[Listing]:
    yield Listing(
        "Largest |entry| of keys and values, the head where the massive token leads most:",
        result.rows(),
    )
    for line in result.missing:
        yield Listing(f"Not there: {line}.")


@table_of("diff")
def _diff(result: Difference) -> Iterator[Listing]:
    yield Listing(f"A: {_side(result.a)}\nB: {_side(result.b)}\n")
    yield Listing("", [_layer_row(result, row) for row in result.profile])
    yield Listing("")
    yield Listing("", [_row(row) for row in result.changes])
    for line in result.cannot:
        yield Listing(f"Not compared: {line}.")
    for line in result.notes:
        yield Listing(f"Note: {line}.")
    yield Listing("")


def _side(side: SideInfo) -> str:
    source = "measured now" if side.source == "model" else f"saved, {side.source}"
    return f"{side.name} ({side.n_layers} layers, {side.dtype}, {source})"


def _layer_row(result: Difference, row: SideRow) -> JsonObject:
    notes = [
        f"{word} of {name}"
        for name, side in (("A", result.a), ("B", result.b))
        for word, layer in (("ME Layer", side.me_layer),)
        if layer == row.layer
    ]
    made = {
        "layer": row.layer,
        "max |x| of A": row.max_a,
        "of B": row.max_b,
        "B / A": row.ratio,
        "write share of A": _rounded(row.share_a),
        "share of B": _rounded(row.share_b),
    }
    if any(other.cosine is not None for other in result.profile):
        made["cosine of the token"] = _rounded(row.cosine)
    return {**made, "": ", ".join(notes)}


def _row(row: Change) -> JsonObject:
    verdict = "-" if row.changed is None else "changed" if row.changed else "same"
    value = "" if row.value is None else f"{row.measure} {cell(row.value)}"
    if row.tolerance is not None:
        value += f" ({'at least' if row.measure == 'cosine' else 'within'} {row.tolerance:g})"
    return {
        "": verdict,
        "what": row.what,
        "A": cell(row.a),
        "B": cell(row.b),
        "measure": value,
        "note": row.note,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
