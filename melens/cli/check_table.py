"""The tables of a check, and of the one measurement that only a check makes."""

from __future__ import annotations

from typing import Any

from melens.cli.output import cell, say, table
from melens.cli.tables import TABLES

NOTHING = "nothing"
"""In place of "ok" where a rule passed because there was nothing to measure."""
SIGNS = {"passed": "ok", "found": "FOUND", "not measured": "-", "off": "off"}


@TABLES.register("check")
def _check(result: Any) -> None:
    grave = {finding.id: finding.severity for finding in result.findings}
    say(f"Rules of the policy '{result.policy.name}' (layers count from 0):")
    table(
        [
            {"rule": rule.id, "": _sign(rule), "severity": grave.get(rule.id, ""),
             "value": cell(rule.value), "threshold": cell(rule.threshold), "unit": rule.unit}
            for rule in result.rules
        ]
    )  # fmt: skip
    for rule in result.rules:
        if rule.status == "not measured":
            say(f"{rule.id}: not measured, {rule.reason}")
    for finding in result.findings:
        say(f"\n{finding.severity.upper()} {finding.id}: {finding.title}.")
        say(f"  Why: {finding.why}")
        say(f"  What to do: {finding.advice}")
    for stage in result.stages:
        if stage.status == "failed":
            say(f"\nStage {stage.name} could not run: {stage.reason}")
    if result.recommendation is not None:
        say(f"\nRecommendation: {result.recommendation.text}")
    say("")


def _sign(rule: Any) -> str:
    empty = rule.status == "passed" and rule.value is None
    return NOTHING if empty else SIGNS[rule.status]


@TABLES.register("cache-norms")
def _cache_norms(result: Any) -> None:
    say("Largest |entry| of keys and values, the head where the massive token leads most:")
    if result.rows():
        table(result.rows())
    for line in result.missing:
        say(f"Not there: {line}.")
