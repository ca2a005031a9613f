"""html_page(): a check as one self-contained page that opens offline and can be mailed."""

from __future__ import annotations

import base64
import gzip
import html
import json
from dataclasses import dataclass
from functools import cache
from importlib import resources

import jinja2
from markupsafe import Markup

from melens.figures.attention_view import DRAW_PANELS, PANEL_STYLE, bundle, content_policy
from melens.protocols import JsonObject
from melens.reporting.evidence import evidence_facts
from melens.reporting.pictures import picture_uri
from melens.reporting.sections import SECTIONS, Fact, PageBlock, PageView, Picture, Table, other
from melens.reporting.shipping import (
    QUESTION,
    SIGNS,
    head_facts,
    nothing_to_do,
    ship_answer,
    to_do,
)
from melens.reporting.source import (
    GLOSSARY,
    Addressed,
    Linked,
    anchor,
    attribute_text,
    page_text,
    step,
)
from melens.results.check import CheckReport

VERDICTS = {
    "pass": "✓ Pass: within the policy",
    "findings": "✗ Findings: not within the policy",
    "incomplete": "? Incomplete: a stage failed",
}


@dataclass
class PagePart:
    """One section of the page: a heading and one block a result."""

    id: str
    title: str
    lead: str
    blocks: list[PageBlock]


def canonical(report: CheckReport) -> CheckReport:
    """The report as it is read back from its file: with its keys in the file's order."""
    return CheckReport.from_json(report.to_json())


def report_parts(report: CheckReport, source: Addressed) -> list[PagePart]:
    """Sections in the registry's order, then whatever has none of its own."""
    views = [
        PageView(source, name, report.result(name), index)
        for index, name in enumerate(sorted(report.results))
    ]
    parts = []
    for kind in SECTIONS.values():
        mine = [view for view in views if type(view.result) is kind.kind]
        if mine:
            blocks = [kind.make(view) for view in mine]
            parts.append(PagePart(kind.id, kind.title, kind.lead, blocks))
    known = {kind.kind for kind in SECTIONS.values()}
    if rest := [other(view) for view in views if type(view.result) not in known]:
        parts.append(PagePart("more", "More results", "", rest))
    return parts


def _counts(report: CheckReport) -> list[Fact]:
    """How many findings of each severity, the most severe first."""
    return [
        Fact(f"{severity} findings", str(sum(f.severity == severity for f in report.findings)))
        for severity in ("critical", "warning", "info")
    ]


def key_facts(report: CheckReport, parts: list[PagePart]) -> list[Fact]:
    """The few numbers for the top: what each section offers, and how many findings there are."""
    offered = [fact for part in parts for block in part.blocks for fact in block.tiles]
    return offered + _counts(report)


@dataclass(frozen=True)
class FindingView:
    """One finding, its numbers with their addresses."""

    id: str
    severity: str
    sign: str
    title: str
    facts: list[Fact]
    source: Linked
    why: str
    advice: str


def finding_views(report: CheckReport, source: Addressed) -> list[FindingView]:
    """In the report's order, the most severe first."""
    return [
        FindingView(
            found.id,
            found.severity,
            SIGNS[found.severity],
            found.title,
            evidence_facts(found, f"/findings/{i}", source),
            source.link(found.source, found.source),
            found.why,
            found.advice,
        )
        for i, found in enumerate(report.findings)
    ]


def rule_table(report: CheckReport, source: Addressed) -> Table:
    """Every rule, found or not."""
    rows = []
    for i, rule in enumerate(report.rules):
        at = f"/rules/{i}"
        rows.append(
            [
                rule.id,
                rule.title,
                rule.status,
                "" if rule.value is None else source.number(f"{at}/value"),
                "" if rule.threshold is None else source.number(f"{at}/threshold"),
                rule.unit,
                rule.reason or "",
            ]
        )
    columns = ("rule", "looks for", "outcome", "measured", "threshold", "unit", "why not")
    return Table(f"All {len(rows)} rules of the check", columns, rows, folded=True)


@dataclass(frozen=True)
class Advice:
    """The recommendation and its numbers."""

    text: str
    facts: list[Fact]


def origin_facts(report: CheckReport, source: Addressed) -> list[Fact]:
    """Model, machine, versions and settings."""
    names = ("model", "model_revision", "weights", "dtype", "device", "seed", "git", "created")
    made = [Fact(name.replace("_", " "), source.number(f"/run/{name}")) for name in names]
    for group in ("versions", "settings"):
        for name in sorted(getattr(report.run, group)):
            made.append(Fact(name, source.number(f"/run/{group}{step(name)}")))
    return made


def stage_table(report: CheckReport, source: Addressed) -> Table:
    """One row a stage."""
    rows = [
        [stage.name, stage.status, source.number(f"/stages/{i}/seconds"), stage.reason or ""]
        for i, stage in enumerate(report.stages)
    ]
    return Table("Stages", ("stage", "outcome", "seconds", "why not"), rows)


def policy_table(report: CheckReport, source: Addressed) -> Table:
    """The policy's own numbers, rule by rule."""
    rows = []
    for rule, values in report.policy.rules.items():
        for name in values:
            at = f"/policy/rules{step(rule)}{step(name)}"
            rows.append([rule, name.replace("_", " "), source.number(at)])
    fail = f"a finding counts from severity “{report.policy.fail_on}” on"
    return Table(
        f"Policy {report.policy.name}: {fail}", ("rule", "setting", "value"), rows, folded=True
    )


def recommendation_view(report: CheckReport, source: Addressed) -> Advice | None:
    """What to do about the massive activation; None unless doses were tried."""
    found = report.recommendation
    if found is None:
        return None
    facts = [Fact("What to do", found.action), Fact("Edit", found.edit or "none")]
    if found.delta is not None:
        facts.append(
            Fact("Loss change (nats a token)", source.number("/recommendation/delta", "signed"))
        )
        facts.append(Fact("Its interval", source.interval("/recommendation/interval")))
    facts.append(Fact("Conditions tried", source.number("/recommendation/tried")))
    if found.source is not None:
        facts.append(Fact("Read from", source.link(found.source, found.source)))
    return Advice(found.text, facts)


LINE = 160
"""Characters that an object or list may have to stand on one line."""
HEAD = 12
"""Entries of a cut list that stay besides the linked ones."""
LIST = 60
"""A list is cut only from this length on."""


@dataclass(frozen=True)
class PagePiece:
    """One part of the report: its pointer, its HTML, and whether lists in it were cut."""

    pointer: str
    html: Markup
    cut: bool


def pieces(data: JsonObject, taken: set[str], most: int) -> list[PagePiece]:
    """The report itself, then result by result; all of it, unless that makes too large a page.

    Args:    taken: pointers that get an id.
             most: characters of JSON; beyond, the long lists of the largest results are cut to
                 what is linked.
    """
    parts: JsonObject = {"": {key: data[key] for key in data if key != "results"}}
    parts |= {f"/results{step(key)}": value for key, value in data["results"].items()}
    sizes = {pointer: len(_json(value)) for pointer, value in parts.items()}
    made = []
    for pointer, value in parts.items():
        cut = bool(pointer) and _over(pointer, sizes, most)
        made.append(PagePiece(pointer, Markup(_Writer(taken, cut).write(value, pointer)), cut))
    return made


def _over(pointer: str, sizes: dict[str, int], most: int) -> bool:
    """Whether this part is one of the largest, which together make the page too large."""
    total = sum(sizes.values())
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        if total <= most:
            return False
        if name == pointer:
            return True
        total -= sizes[name]
    return False


class _Writer:
    """Escaped JSON text; each linked place in a span with its id."""

    def __init__(self, taken: set[str], cut: bool):
        self.taken, self.cut = taken, cut
        self.above = {
            pointer[:i] for pointer in taken for i, letter in enumerate(pointer) if letter == "/"
        }

    def write(self, value: object, pointer: str, indent: str = "") -> str:
        text = self._value(value, pointer, indent)
        if pointer in self.taken:
            return f'<span id="{anchor(pointer)}">{text}</span>'
        return text

    def _value(self, value: object, pointer: str, indent: str) -> str:
        if not isinstance(value, dict | list) or not value:
            return _escaped(value)
        whole = _json(value)
        plain = all(not isinstance(part, dict | list) for part in _parts(value))
        one_line = len(whole) <= LINE or (plain and isinstance(value, list))
        long = self.cut and isinstance(value, list) and len(value) > LIST
        if one_line and not long and pointer not in self.above:
            return html.escape(whole, quote=False)
        inner = "" if one_line else f"{indent} "
        written = self._entries(value, pointer, inner, long)
        start, end = "{}" if isinstance(value, dict) else "[]"
        if one_line:
            return f"{start}{', '.join(written)}{end}"
        body = f",\n{inner}".join(written)
        return f"{start}\n{inner}{body}\n{indent}{end}"

    def _entries(
        self, value: JsonObject | list[object], pointer: str, indent: str, long: bool
    ) -> list[str]:
        if isinstance(value, dict):
            return [
                f"{_escaped(key)}: {self.write(value[key], pointer + step(key), indent)}"
                for key in sorted(value)
            ]
        places = [f"{pointer}/{i}" for i in range(len(value))]
        kept = [
            i
            for i, place in enumerate(places)
            if not long or i < HEAD or place in self.taken or place in self.above
        ]
        written = [self.write(value[i], places[i], indent) for i in kept]
        if left := len(value) - len(kept):
            written.append(_escaped(f"... {left} of {len(value)} entries: see report.json"))
        return written


def _parts(value: JsonObject | list[object]) -> list[object]:
    return list(value.values()) if isinstance(value, dict) else value


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _escaped(value: object) -> str:
    return html.escape(_json(value), quote=False)


LARGEST = 1_950_000
"""Characters of a page; few are more than a byte, so the file stays below 2 MB."""
REST = 300_000
"""Of these, for tables, words and the ids in the JSON."""


def html_page(report: CheckReport) -> str:
    """The page. Equal reports give equal bytes.

    Raises:  OutputError: circuitsvis is missing though heads are to be drawn.
    """
    report = canonical(report)
    source = Addressed(report.to_dict())
    parts = report_parts(report, source)
    blocks = [block for part in parts for block in part.blocks]
    panels = any(block.panels for block in blocks)
    js, css = _asset("page.js"), _asset("page.css") + PANEL_STYLE
    boot = f"{DRAW_PANELS}{_asset('unpack.js')}"
    drawer = bundle()[0] if panels else ""
    ship = ship_answer(report)
    values: JsonObject = {
        "report": report,
        "title": f"melens check: {report.model}",
        "question": QUESTION,
        "ship": ship,
        "to_do": _places(report),
        "nothing_to_do": nothing_to_do(report),
        "head": head_facts(report, source),
        "tiles": key_facts(report, parts),
        "findings": finding_views(report, source),
        "rules": rule_table(report, source),
        "advice": recommendation_view(report, source),
        "parts": parts,
        "drawn": {block.name: [_draw(p, block.name) for p in block.pictures] for block in blocks},
        "origin": origin_facts(report, source),
        "stages": stage_table(report, source),
        "policy": policy_table(report, source),
        "glossary": list(GLOSSARY.items()),
        "panels": panels,
        "csp": Markup(content_policy(js, *((drawer, boot) if panels else ()))),
        "css": Markup(css),
        "js": Markup(js),
        "bundle": Markup(packed(drawer)),
        "boot": Markup(boot),
    }
    values["contents"] = _contents(values)
    values["pieces"] = [
        {"label": piece.pointer or "the report", "html": piece.html, "cut": piece.cut}
        for piece in pieces(source.data, source.taken, _room(values))
    ]
    return _environment().get_template("page.html.j2").render(values) + "\n"


@cache
def packed(script: str) -> str:
    """A script as base64 of gzip: a third of its size; unpack.js puts it back into the page."""
    return base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode()


def _places(report: CheckReport) -> list[JsonObject]:
    """What to do now: the advice, and the number of the finding on the page."""
    return [{"at": report.findings.index(f) + 1, "finding": f} for f in to_do(report)]


def _draw(picture: Picture, name: str) -> JsonObject:
    uri = Markup(picture_uri(picture.result, picture.style))
    return {
        "uri": uri,
        "alt": picture.alt,
        "caption": picture.caption,
        "narrow": picture.narrow,
        "name": f"{name}, {picture.style or 'default'}",
    }


def _room(values: JsonObject) -> int:
    """Characters that the JSON may have: what the figures and scripts leave of the page."""
    large = [values["bundle"], *(made["uri"] for row in values["drawn"].values() for made in row)]
    large += [panel.html for part in values["parts"] for b in part.blocks for panel in b.panels]
    return max(0, LARGEST - REST - sum(map(len, large)))


def _contents(values: JsonObject) -> list[dict[str, str]]:
    entries = [("findings", "Findings")]
    if values["advice"]:
        entries.append(("recommendation", "Recommendation"))
    entries += [(part.id, part.title.split(":")[0]) for part in values["parts"]]
    entries += [("stages", "How it was made"), ("glossary", "Glossary"), ("json", "JSON")]
    return [{"id": id, "title": title} for id, title in entries]


@cache
def _environment() -> jinja2.Environment:
    """Everything that is printed is escaped; text of others is kept from turning the line round."""
    made = jinja2.Environment(
        loader=jinja2.DictLoader({"page.html.j2": _asset("page.html.j2")}),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_safe,
    )
    made.filters["attribute"] = attribute_text
    return made


def _safe(value: object) -> object:
    """Plain text becomes safe HTML; what is HTML already stays."""
    if isinstance(value, Linked) or hasattr(value, "__html__"):
        return value
    return page_text(str(value))


def _asset(name: str) -> str:
    return (resources.files("melens.reporting") / "templates" / name).read_text("utf-8")
