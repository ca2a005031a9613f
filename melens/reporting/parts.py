"""What a report has to show: its results by section, its key numbers, its verdict in words."""

from __future__ import annotations

from dataclasses import dataclass

from melens.reporting.sections import SECTIONS, Block, Fact, View, other
from melens.reporting.source import Source
from melens.results.check import CheckReport

VERDICTS = {
    "pass": "✓ Pass: within the policy",
    "findings": "✗ Findings: not within the policy",
    "incomplete": "? Incomplete: a stage failed",
}


@dataclass
class Part:
    """One section of the page: a heading and one block a result."""

    id: str
    title: str
    lead: str
    blocks: list[Block]


def canonical(report: CheckReport) -> CheckReport:
    """The report as it is read back from its file: with its keys in the file's order."""
    return CheckReport.from_json(report.to_json())


def report_parts(report: CheckReport, source: Source) -> list[Part]:
    """Sections in the registry's order, then whatever has none of its own."""
    views = [
        View(source, name, report.result(name), index)
        for index, name in enumerate(sorted(report.results))
    ]
    parts = []
    for kind in SECTIONS.values():
        mine = [view for view in views if type(view.result) is kind.kind]
        if mine:
            blocks = [kind.make(view) for view in mine]
            parts.append(Part(kind.id, kind.title, kind.lead, blocks))
    known = {kind.kind for kind in SECTIONS.values()}
    if rest := [other(view) for view in views if type(view.result) not in known]:
        parts.append(Part("more", "More results", "", rest))
    return parts


def _counts(report: CheckReport) -> list[Fact]:
    """How many findings of each severity, the gravest first."""
    return [
        Fact(f"{severity} findings", str(sum(f.severity == severity for f in report.findings)))
        for severity in ("critical", "warning", "info")
    ]


def key_facts(report: CheckReport, parts: list[Part]) -> list[Fact]:
    """The few numbers for the top: what each section offers, and how many findings there are."""
    offered = [fact for part in parts for block in part.blocks for fact in block.tiles]
    return offered + _counts(report)
