"""The files of a check: markdown, the JSON schema, and all three written."""

from __future__ import annotations

from pathlib import Path

from pydantic.json_schema import models_json_schema

from melens.protocols import JsonObject
from melens.reporting.page import VERDICTS, canonical, html_page, key_facts, report_parts
from melens.reporting.sections import SECTIONS
from melens.reporting.shipping import QUESTION, SIGNS, nothing_to_do, ship_answer, to_do
from melens.reporting.source import Addressed, code_span, markdown_text, number_text
from melens.results.base import Result
from melens.results.check import REPORT_JSON, CheckReport
from melens.store import write_atomically


def markdown_report(report: CheckReport) -> str:
    """The whole file: the verdict, key numbers, findings and how it was made."""
    title = f"# melens check: {markdown_text(report.model)}"
    return f"{title}\n\n{markdown_body(report, level=2)}"


def markdown_body(report: CheckReport, *, level: int) -> str:
    """The same below a heading of the caller's; ``level`` is that of its own headings."""
    report, mark = canonical(report), "#" * level
    source = Addressed(report.to_dict())
    facts = key_facts(report, report_parts(report, source))
    pieces = [
        f"**{QUESTION} {markdown_text(ship_answer(report).text)}**",
        _to_do(report),
        f"{VERDICTS[report.verdict]}. {markdown_text(report.answer)}",
        _table(("number", "value"), [(fact.label, str(fact.value)) for fact in facts]),
        f"{mark} Findings",
        _findings(report),
        *_recommendation(report, mark),
        f"{mark} How this was made",
        _origin(report),
    ]
    return "\n\n".join(pieces) + "\n"


def _to_do(report: CheckReport) -> str:
    """What to do now, a point a finding."""
    found = to_do(report)
    if not found:
        return f"What to do now: {nothing_to_do(report)}"
    lines = [f"{i}. {markdown_text(f.advice)} ({f.id})" for i, f in enumerate(found, start=1)]
    return "\n".join(("What to do now:", "", *lines))


def _findings(report: CheckReport) -> str:
    if not report.findings:
        return "Nothing was found that the policy has a word on."
    rows = []
    for found in report.findings:
        rows.append(
            (
                f"{SIGNS[found.severity]} {found.severity}",
                f"{found.title} ({found.id})",
                number_text(found.value),
                number_text(found.threshold),
                found.unit or "none",
                found.why,
                found.advice,
            )
        )
    columns = (
        "severity",
        "finding",
        "measured",
        "threshold",
        "in units of",
        "why it matters",
        "what to do",
    )
    return _table(columns, rows)


def _recommendation(report: CheckReport, mark: str) -> list[str]:
    found = report.recommendation
    if found is None:
        return []
    text = f"{found.text} Conditions tried: {found.tried}"
    if found.interval is not None:
        text += "; the interval is as wide as that many ask for"
    text = markdown_text(f"{text}.")  # which holds the change and its interval already
    return [f"{mark} Recommendation", text]


def _origin(report: CheckReport) -> str:
    run = report.run
    versions = ", ".join(f"{name} {version}" for name, version in sorted(run.versions.items()))
    facts = f"{versions}; {run.dtype} on {run.device}; seed {run.seed}; weights {run.weights}"
    policy = f"budget {report.budget}, policy {report.policy.name}"
    missed = [
        f"- Stage {markdown_text(stage.name)} {stage.status}: {markdown_text(stage.reason or '')}"
        for stage in report.stages
        if stage.status == "failed"
    ]
    lines = [
        f"- Command: {code_span(run.command)}",
        f"- {markdown_text(policy)}",
        f"- {markdown_text(facts)}",
        f"- {markdown_text(run.created)}",
        "- Layers count from 0, at the block output.",
        *missed,
    ]
    return "\n".join(lines)


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(map(markdown_text, row))} |" for row in rows]
    return "\n".join(lines)


DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> JsonObject:
    """JSON Schema (draft 2020-12) of a saved check; docs/report.schema.json is this.

    An embedded result is held to the schema of its kind where the page has a section for it.
    """
    kinds: list[type[Result]] = [part.kind for part in SECTIONS.values()]
    made, shared = models_json_schema(
        [(kind, "serialization") for kind in (CheckReport, *kinds)], ref_template="#/$defs/{model}"
    )
    definitions = shared["$defs"]
    top = definitions.pop(made[CheckReport, "serialization"]["$ref"].rsplit("/", 1)[1])
    names = [kind.schema_id for kind in kinds]
    unlisted = {
        "type": "object",
        "properties": {"schema": {"type": "string", "not": {"enum": names}}},
        "required": ["schema"],
    }
    held = [made[kind, "serialization"] for kind in kinds]
    top["properties"]["results"]["additionalProperties"] = {"oneOf": [*held, unlisted]}
    return {"$schema": DIALECT, **top, "title": "melens check report", "$defs": definitions}


def write_report(report: CheckReport, folder: Path) -> list[Path]:
    """Write report.html, report.md and report.json into a folder, each atomically.

    All three are made before the first is written.

    Returns: their paths, in this order.
    Raises:  OutputError: the folder cannot be made or written; circuitsvis is missing.
    """
    texts = {
        "report.html": html_page(report),
        "report.md": markdown_report(report),
        REPORT_JSON: report.to_json(),
    }
    paths = []
    for name, text in texts.items():
        write_atomically(folder / name, text)
        paths.append(folder / name)
    return paths
