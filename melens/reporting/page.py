"""html_page(): a check as one self-contained page that opens offline and can be mailed."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from melens.figures.attention_view import BOOT, PANEL_STYLE, bundle, content_policy
from melens.reporting.embedded import pieces
from melens.reporting.findings import finding_views, rule_table
from melens.reporting.glossary import GLOSSARY
from melens.reporting.origin import origin_facts, policy_table, recommendation_view, stage_table
from melens.reporting.parts import VERDICTS, canonical, key_facts, report_parts
from melens.reporting.pictures import picture_uri
from melens.reporting.sections import Picture
from melens.reporting.source import Linked, Source
from melens.reporting.text import attribute_text, page_text
from melens.results.check import CheckReport

LARGEST = 4_700_000
"""Characters of a page; one may be three bytes, so the file stays below 5 MB."""
REST = 500_000
"""Of these, for tables, words and the ids in the JSON."""


def html_page(report: CheckReport) -> str:
    """The page. Equal reports give equal bytes.

    Raises:  OutputError: circuitsvis is missing though heads are to be drawn.
    """
    report = canonical(report)
    source = Source(report.to_dict())
    parts = report_parts(report, source)
    blocks = [block for part in parts for block in part.blocks]
    panels = any(block.panels for block in blocks)
    js, css = _asset("page.js"), _asset("page.css") + PANEL_STYLE
    scripts = [js, *((bundle()[0], BOOT) if panels else ())]
    values: dict[str, Any] = {
        "report": report,
        "title": f"melens check: {report.model}",
        "verdict": {"css": report.verdict, "text": VERDICTS[report.verdict]},
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
        "csp": Markup(content_policy(*scripts)),
        "css": Markup(css),
        "js": Markup(js),
        "bundle": Markup(scripts[1]) if panels else "",
        "boot": Markup(BOOT),
    }
    values["contents"] = _contents(values)
    values["pieces"] = [
        {"label": piece.pointer or "the report", "html": piece.html, "cut": piece.cut}
        for piece in pieces(source.data, source.taken, _room(values))
    ]
    return _environment().get_template("page.html.j2").render(values) + "\n"


def _draw(picture: Picture, name: str) -> dict[str, Any]:
    uri = Markup(picture_uri(picture.result, picture.style))
    return {"uri": uri, "alt": picture.alt, "caption": picture.caption, "narrow": picture.narrow,
            "name": f"{name}, {picture.style or 'default'}"}  # fmt: skip


def _room(values: dict[str, Any]) -> int:
    """Characters that the JSON may have: what the figures and scripts leave of the page."""
    large = [values["bundle"], *(made["uri"] for row in values["drawn"].values() for made in row)]
    large += [panel.html for part in values["parts"] for b in part.blocks for panel in b.panels]
    return max(0, LARGEST - REST - sum(map(len, large)))


def _contents(values: dict[str, Any]) -> list[dict[str, str]]:
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
        loader=jinja2.DictLoader({"page.html.j2": _asset("page.html.j2")}), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_safe,
    )  # fmt: skip
    made.filters["attribute"] = attribute_text
    return made


def _safe(value: Any) -> Any:
    """Plain text becomes safe HTML; what is HTML already stays."""
    if isinstance(value, Linked) or hasattr(value, "__html__"):
        return value
    return page_text(str(value))


def _asset(name: str) -> str:
    return (resources.files("melens.reporting") / "templates" / name).read_text("utf-8")
