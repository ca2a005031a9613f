"""Findings and rules as the page shows them."""

from __future__ import annotations

from dataclasses import dataclass

from melens.reporting.sections import Fact, Table
from melens.reporting.source import Linked, Source, step
from melens.results.check import CheckReport, Finding

SIGNS = {"critical": "✗", "warning": "▲", "info": "●"}
"""Beside the word, so that no colour has to say it."""


@dataclass(frozen=True)
class FindingView:
    """One finding, its numbers with their addresses."""

    id: str
    severity: str
    sign: str
    title: str
    facts: list[Fact]
    unit: str
    source: Linked
    why: str
    advice: str


def finding_views(report: CheckReport, source: Source) -> list[FindingView]:
    """In the report's order, the gravest first."""
    return [
        FindingView(
            found.id, found.severity, SIGNS[found.severity], found.title,
            _facts(found, f"/findings/{i}", source), found.unit or "none",
            source.link(found.source, found.source), found.why, found.advice,
        )
        for i, found in enumerate(report.findings)
    ]  # fmt: skip


def _facts(found: Finding, at: str, source: Source) -> list[Fact]:
    made = [
        Fact("Measured", source.number(f"{at}/value")),
        Fact("Policy's threshold", source.number(f"{at}/threshold")),
    ]
    return made + [
        Fact(name.replace("_", " "), source.number(f"{at}/evidence{step(name)}"))
        for name in found.evidence
    ]


def rule_table(report: CheckReport, source: Source) -> Table:
    """Every rule, found or not."""
    rows = []
    for i, rule in enumerate(report.rules):
        at = f"/rules/{i}"
        rows.append([
            rule.id, rule.title, rule.status,
            "" if rule.value is None else source.number(f"{at}/value"),
            "" if rule.threshold is None else source.number(f"{at}/threshold"),
            rule.unit, rule.reason or "",
        ])  # fmt: skip
    columns = ("rule", "looks for", "outcome", "measured", "threshold", "unit", "why not")
    return Table(f"All {len(rows)} rules of the check", columns, rows, folded=True)
