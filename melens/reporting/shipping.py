"""Whether the model can be shipped, in one line, and what to do now: the top of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from melens.formatting import counted
from melens.reporting.sections import Fact
from melens.reporting.source import Addressed, step
from melens.results.check import SEVERITIES, CheckReport, Finding

Level = Literal["pass", "info", "warning", "critical", "incomplete"]
"""The most severe finding that the policy counts; red is for ``critical`` alone."""
QUESTION = "Can I ship this?"
SIGNS = {"critical": "✗", "warning": "▲", "info": "●", "pass": "✓", "incomplete": "?"}
"""Beside the word, so that no colour has to say it."""
SEVERITY_NAMES = {"critical": "critical finding", "warning": "warning", "info": "remark"}


@dataclass(frozen=True)
class ShipAnswer:
    """The first line of a report."""

    level: Level
    text: str

    @property
    def sign(self) -> str:
        """Of its level."""
        return SIGNS[self.level]


def ship_answer(report: CheckReport) -> ShipAnswer:
    """Yes, no, or not known, from the findings that the policy counts."""
    rules = f"the policy '{report.policy.name}'"
    found = report.counted()
    open_ = _open(report)
    failed = ", ".join(stage.name for stage in report.stages if stage.status == "failed")
    could_not = f" {failed} could not run." if failed else ""
    if report.policy.fail_on == "never" and report.findings:
        level = SEVERITIES[max(SEVERITIES.index(f.severity) for f in report.findings)]
        kinds = _kinds(report.findings)
        return ShipAnswer(
            level, f"Your decision: {rules} only reports, and found {kinds}.{could_not}{open_}"
        )
    if found:
        worst = found[0].severity
        said = {"critical": "Not as it is", "warning": "Only with care"}.get(worst)
        if said is None:
            said = "Not known yet" if failed else "Yes, with remarks"
        return ShipAnswer(worst, f"{said}: {_kinds(found)} under {rules}.{could_not}{open_}")
    if failed or report.verdict == "incomplete":
        return ShipAnswer("incomplete", f"Not known yet:{could_not}{open_}")
    beside = counted(len(report.findings), "remark") if report.findings else "nothing"
    return ShipAnswer("pass", f"Yes, as far as {rules} asks; {beside} found beside it.{open_}")


def _kinds(found: Sequence[Finding]) -> str:
    """How many findings of each severity."""
    counts = [(one, sum(f.severity == one for f in found)) for one in SEVERITY_NAMES]
    return " and ".join(counted(n, SEVERITY_NAMES[one]) for one, n in counts if n)


def _open(report: CheckReport) -> str:
    """How many rules have no answer: a yes is about the others only."""
    n = sum(rule.status == "not measured" for rule in report.rules)
    verb = "was" if n == 1 else "were"
    return f" {n} of {len(report.rules)} rules {verb} not measured." if n else ""


def to_do(report: CheckReport) -> tuple[Finding, ...]:
    """Findings whose advice comes first: those that the policy counts, the most severe first.

    Where it counts none, those above a remark.
    """
    return report.counted() or tuple(f for f in report.findings if f.severity != "info")


def nothing_to_do(report: CheckReport) -> str:
    """The line in place of a list without entries."""
    if any(stage.status == "failed" for stage in report.stages):
        return "Run the check again; what failed, and why, stands under “How it was made”."
    return "Nothing that the policy asks for."


def head_facts(report: CheckReport, source: Addressed) -> list[Fact]:
    """What was checked, when, on how many texts, and how many rules have an answer."""
    run = report.run
    made = [
        Fact("Model or path", source.number("/run/model")),
        Fact("Date", source.link("/run/created", run.created[:16].replace("T", " "))),
        Fact("Number format (dtype)", source.number("/run/dtype")),
    ]
    for name, label in (("sequences", "Texts"), ("length", "Tokens of a text")):
        if name in run.settings:
            made.append(Fact(label, source.number(f"/run/settings{step(name)}")))
    made.append(Fact("Hash of the weights", source.number("/run/weights")))
    status = [rule.status for rule in report.rules]
    answered = sum(one in ("passed", "found") for one in status)
    made.append(Fact("Rules measured", f"{answered} of {len(status)}"))
    for one in ("not measured", "off"):
        names = [rule.id for rule in report.rules if rule.status == one]
        if names:
            label = "Rules not measured" if one == "not measured" else "Rules turned off"
            made.append(Fact(label, f"{len(names)}: {', '.join(names)}"))
    return made
