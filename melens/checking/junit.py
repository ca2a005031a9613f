"""junit_xml(): a report as test cases, for the systems that show those."""

from __future__ import annotations

from xml.etree import ElementTree as Tree

from melens.formatting import printable
from melens.results import CheckReport, Finding, RuleOutcome, StageRecord


def junit_xml(report: CheckReport) -> str:
    """One test case a rule and one a stage that could not run, as JUnit's XML.

    A finding that the policy counts is a failure; one that it does not is a passed case with its
    text; a rule that was not measured or is off is skipped; a stage that failed is an error.
    """
    counted = {finding.id for finding in report.counted()}
    findings = {finding.id: finding for finding in report.findings}
    failed = [stage for stage in report.stages if stage.status == "failed"]
    skipped = [rule for rule in report.rules if rule.status in ("not measured", "off")]
    suite = Tree.Element(
        "testsuite",
        name=_text(f"melens check {report.model}"),
        tests=str(len(report.rules) + len(failed)),
        failures=str(len(counted)),
        errors=str(len(failed)),
        skipped=str(len(skipped)),
        timestamp=report.run.created[:19],
        time=f"{sum(stage.seconds for stage in report.stages):.3f}",
    )
    for rule in report.rules:
        _rule(suite, rule, findings.get(rule.id), counted=rule.id in counted)
    for stage in failed:
        _stage(suite, stage)
    Tree.indent(suite, " ")
    body = Tree.tostring(suite, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{body}\n'


def _rule(suite: Tree.Element, rule: RuleOutcome, found: Finding | None, *, counted: bool) -> None:
    case = Tree.SubElement(suite, "testcase", classname="melens.check", name=rule.id, time="0")
    if found is not None:
        said = f"{found.title}. Why: {found.why} What to do: {found.advice}"
        if counted:
            message = f"{found.severity}: {found.title}"
            Tree.SubElement(
                case, "failure", type=found.severity, message=_text(message)
            ).text = _text(said)
        else:
            Tree.SubElement(case, "system-out").text = _text(f"{found.severity}: {said}")
    elif rule.status != "passed":
        Tree.SubElement(case, "skipped", message=_text(rule.reason or rule.status))


def _stage(suite: Tree.Element, stage: StageRecord) -> None:
    case = Tree.SubElement(
        suite,
        "testcase",
        classname="melens.check",
        name=f"stage {stage.name}",
        time=f"{stage.seconds:.3f}",
    )
    Tree.SubElement(case, "error", message=_text(stage.reason or "could not run"))


def _text(text: str) -> str:
    """XML 1.0 cannot hold most controls, escaped or not."""
    return printable(text, keep="\n\t")
