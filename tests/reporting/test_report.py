from __future__ import annotations

import base64
import gzip
import hashlib
import itertools
import json
import re
import xml.etree.ElementTree as ET
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import planted_report as planted
import pytest

from melens.errors import OutputError, ResultError
from melens.figures.attention_view import bundle
from melens.reporting import (
    html_page,
    json_schema,
    markdown_report,
    refuse_bad_card,
    sections,
    update_card,
    write_report,
    writing,
)
from melens.reporting import page as report_page
from melens.reporting.card import CHECK
from melens.reporting.sections.base import PageView
from melens.reporting.source import (
    GLOSSARY,
    Addressed,
    anchor,
    code_span,
    markdown_text,
    number_text,
    page_text,
)
from melens.results import load_result
from melens.results.base import look_up
from melens.results.check import CheckReport

DOCS = Path(__file__).parents[2] / "docs"
START, END = CHECK
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements with their own text, as a parser other than the browser sees them."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.made: list[dict] = []
        self.open: list[dict] = []
        self.feed(text)
        self.close()
        assert not self.open, [element["tag"] for element in self.open]

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names)
        element = {"tag": tag, "text": "", "inside": [e["tag"] for e in self.open], **dict(attrs)}
        self.made.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag: str) -> list[dict]:
        return [element for element in self.made if element["tag"] == tag]

    def ids(self) -> dict[str, dict]:
        found = [element for element in self.made if "id" in element]
        assert len({element["id"] for element in found}) == len(found)
        return {element["id"]: element for element in found}


@cache
def page(which: str) -> Page:
    return Page(html(which))


html, made = planted.page, planted.checked


MODELS = ("smollm2", "gemma")
ALL = (*MODELS, "hostile")


@pytest.mark.parametrize("which", ALL)
def test_every_number_leads_to_its_place_and_says_what_stands_there(which):
    ids = page(which).ids()
    links = [element for element in page(which).all("a") if element.get("class") == "n"]
    assert len(links) > 300
    source, read = Addressed(made(which).to_dict()), cache(json.loads)
    for link in links:
        name = link["href"].removeprefix("#")
        assert name in ids, name
        value = source.at(unquote(name.removeprefix("json")))
        assert read(ids[name]["text"]) == value or "see report.json" in ids[name]["text"]
        if link["text"].startswith(("/", "L")):  # words of the page's own
            continue
        if isinstance(value, float) and not link["text"].endswith("%"):
            said = float(re.match(r"[-+\d.,e]+", link["text"])[0].replace(",", ""))
            assert said == pytest.approx(value, rel=1e-3, abs=0.5 if abs(value) >= 1000 else 0)
        elif isinstance(value, float):
            said = float(link["text"].removesuffix("%").replace(",", "")) / 100
            assert said == pytest.approx(value, abs=0.006 if abs(value) >= 0.9995 else 6e-4)
        elif isinstance(value, bool):
            assert link["text"] == ("yes" if value else "no")
        elif isinstance(value, int):
            assert int(link["text"].replace(",", "").split()[0]) == value


@pytest.mark.parametrize("which", ALL)
def test_every_link_has_a_target_and_nothing_leaves_the_page(which):
    ids = page(which).ids()
    for element in page(which).made:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            if name in element and element[name] is not None:
                assert element[name].startswith(("#", "data:image/svg+xml,")), element
        if element["tag"] == "a":
            assert element["href"][1:] in ids
        assert not [name for name in element if name.startswith("on") or name == "style"]
    for name in ("aria-labelledby", "aria-describedby"):
        assert {e[name] for e in page(which).made if name in e} <= set(ids)


@pytest.mark.parametrize("which", ALL)
def test_the_policy_allows_the_pages_own_scripts_and_no_network(which):
    csp = next(e["content"] for e in page(which).all("meta") if "http-equiv" in e)
    parts = dict(part.split(maxsplit=1) for part in csp.split("; "))
    scripts = page(which).all("script")
    code = [e["text"] for e in scripts if "type" not in e]
    assert len(code) == 2
    (drawer,) = (e["text"] for e in scripts if e.get("id") == "drawer")
    code.append(gzip.decompress(base64.b64decode(drawer)).decode())
    assert code[-1] == bundle()[0]
    assert {e.get("type") for e in scripts} == {None, "application/json", "application/gzip"}
    hashes = {
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in code
    }
    assert set(parts.pop("script-src").split()) == hashes
    assert parts.pop("default-src") == "'none'"
    assert parts.pop("img-src").split()[0] == "data:"
    assert set(parts) == {"style-src", "font-src", "base-uri", "form-action"}


@pytest.mark.parametrize("which", ALL)
def test_the_page_is_small(which):
    assert len(html(which).encode()) < 2_000_000
    assert html(which).startswith("<!doctype html>")


def test_a_report_read_back_gives_the_same_bytes():
    again = CheckReport.from_json(made("hostile").to_json())
    assert list(again.results) != list(made("hostile").results)
    assert html_page(again) == html("hostile")
    assert markdown_report(again) == markdown_report(made("hostile"))


@pytest.mark.parametrize("which", MODELS)
def test_the_page_has_what_it_promises_in_order(which):
    headings = [e for e in page(which).made if re.fullmatch("h[1-6]", e["tag"])]
    assert [e["tag"] for e in headings].count("h1") == 1
    levels = [int(e["tag"][1]) for e in headings if "panel" not in e["inside"]]
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    ids = [e["id"] for e in page(which).all("h2")]
    assert ids == [
        "now",
        "contents",
        "findings",
        "recommendation",
        "emergence",
        "token",
        "rank",
        "sinks",
        "cache",
        "attention",
        "isolation",
        "super-weights",
        "edits",
        "stages",
        "glossary",
        "json-title",
    ]
    listed = [e["href"][1:] for e in page(which).all("a") if "nav" in e["inside"]]
    assert listed == [*ids[2:-1], "json"]
    tags = [e["tag"] for e in page(which).made]
    for landmark in ("header", "nav", "main", "footer"):
        assert tags.count(landmark) == 1
    assert {"lang": "en", "dir": "ltr"}.items() <= page(which).all("html")[0].items()
    assert page(which).all("a")[0]["href"] == "#main"
    text = page(which).all("main")[0]["text"]
    for word in GLOSSARY:
        assert word in text
    for part in ("Why it matters.", "What to do.", made(which).run.command, "counted from 0"):
        assert part in text


@pytest.mark.parametrize("which", MODELS)
def test_figures_are_drawn_and_described_with_their_numbers(which):
    images = page(which).all("img")
    assert len(images) == 9
    for image in images:
        data = unquote(image["src"].split(",", 1)[1])
        root = ET.fromstring(data)
        assert root.tag.endswith("svg")
        assert len(list(root.iter())) > 100
        assert "<text" not in data  # no font of the reader's is needed
        assert len(re.findall(r"\d", image["alt"])) >= 4, image["alt"]
    alt = page("smollm2").all("img")[0]["alt"]
    assert "at layer 10 to 24,926 at layer 11" in alt


@pytest.mark.parametrize("which", ALL)
def test_tables_are_labelled(which):
    for table in (e for e in page(which).made if e["tag"] in ("th", "table", "caption")):
        if table["tag"] == "th":
            assert table["scope"] in ("col", "row")
    assert len(page(which).all("table")) == len(page(which).all("caption"))
    regions = [e for e in page(which).made if e.get("role") == "region"]
    assert all(e["aria-label"] and e["tabindex"] == "0" for e in regions)
    assert len(regions) == len(page(which).all("table"))


def test_the_embedded_json_is_the_report():
    data = report_page.canonical(made("smollm2")).to_dict()
    found = report_page.pieces(data, {"/model", "/results/sinks/overall/0.3"}, 9_000_000)
    texts = [Page(f"<pre>{piece.html}</pre>").all("pre")[0]["text"] for piece in found]
    whole = json.loads(texts[0])
    names = sorted(data["results"])
    assert whole | {"results": {}} == data | {"results": {}}
    for name, text in zip(names, texts[1:], strict=True):
        assert json.loads(text) == data["results"][name]
    assert not any(piece.cut for piece in found)


def test_too_much_json_is_cut_but_for_what_is_linked():
    small = page("smollm2")
    assert len(html("smollm2")) < report_page.LARGEST
    ids = small.ids()
    links = [e["href"][1:] for e in small.all("a") if e.get("class") == "n"]
    assert set(links) <= set(ids)
    cut = json.loads(next(e["text"] for e in small.all("pre") if "collapse/1" in e["text"]))
    rows = made("smollm2").results["collapse"]["rows"]
    assert cut["rows"][:5] == rows[:5]
    assert re.fullmatch(r"\.\.\. \d+ of \d+ entries: see report.json", cut["rows"][-1])
    assert len(cut["rows"]) < len(rows) / 10
    value = ids["json/results/collapse/rows/0/with_token"]["text"]
    assert json.loads(value) == rows[0]["with_token"]


def test_hostile_text_is_text():
    found = page("hostile")
    assert {e["tag"] for e in found.made} <= {e["tag"] for e in page("smollm2").made} | {"bdi"}
    assert len(found.all("img")) == 4
    own, other = ([e["text"] for e in p.all("script")][-1] for p in (found, page("smollm2")))
    assert own == other
    shown = found.all("main")[0]["text"]
    for token in planted.HOSTILE[:5]:
        assert token in shown
    assert "\\u202egnp.exe" in shown
    for letter in ("\u202e", "\x00", "\x1b"):
        assert letter not in html("hostile")
    assert "49" not in found.all("h3")[0]["text"]
    runs = [e["text"] for e in found.all("bdi")]
    assert "שלום עולם" in runs
    assert "مرحبا" in runs
    outside = re.sub(r"<bdi[^>]*>[^<]*</bdi>", "", html("hostile"))
    outside = re.sub(r'(alt|aria-label)="[^"]*"|<title>[^<]*</title>', "", outside)
    assert not re.search("[\u0590-\u06ff]", outside)


PUBLISHED = DOCS / "results" / "smollm2-135m.locate.json"


def test_confidence_names_what_it_is_about():
    from melens.reporting.sections.located import emergence

    none = load_result(PUBLISHED).model_copy(
        update={"verdict": "none", "me_layer": None, "massive": ()}
    )
    said = {}
    for result in (none, load_result(PUBLISHED)):
        source = Addressed({"results": {"locate": result.to_dict()}})
        facts = emergence(PageView(source, "locate", result)).facts
        said[result.verdict] = [fact.label for fact in facts if "onfidence" in fact.label]
    assert said.pop("none") == ["Confidence that there is none"]
    assert list(said.values()) == [["Confidence that one layer explains it"]]


@pytest.mark.parametrize(
    "name", ["smollm2-135m", "some-organisation/a-very-long-name-7B-Instruct-v0.3"]
)
def test_a_title_stays_clear_of_the_legend(name):
    result = load_result(PUBLISHED)
    run = result.run.model_copy(update={"model": name})
    made = result.model_copy(update={"run": run, "verdict": "re-emergent"}).plot()
    made.draw_without_rendering()
    axes = made.axes[0]
    (title,) = [part for part in axes.get_children() if getattr(part, "_text", "").startswith(name)]
    window = title.get_window_extent()
    (legend,) = made.legends
    assert not window.overlaps(legend.get_window_extent())
    assert window.x1 <= made.bbox.x1


def test_markdown_gives_the_recommended_change_once():
    found = made("smollm2").recommendation
    said = "Leave it: the best, zero, changes the loss by +0.0041 nats a token (-0.002 to +0.01)."
    report = made("smollm2").model_copy(
        update={"recommendation": found.model_copy(update={"text": said})}
    )
    text = markdown_report(report).split("## Recommendation")[1].split("##")[0].strip()
    assert text == f"{said} Conditions tried: 6; the interval is as wide as that many ask for."


def test_hostile_text_is_text_in_markdown_too():
    from markdown_it import MarkdownIt

    text = markdown_report(made("hostile"))
    parser = MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough")
    tokens = [inner for token in parser.parse(text) for inner in (token, *(token.children or ()))]
    kinds = {token.type for token in tokens}
    assert not kinds & {"image", "link_open", "em_open", "s_open", "html_block"}
    inline = {token.content for token in tokens if token.type == "html_inline"}
    assert inline <= {"<bdi>", "</bdi>"}
    plain = Page(parser.render(text))
    said = " ".join(e["text"] for e in plain.all("td"))
    assert planted.HOSTILE[0] in said
    assert planted.HOSTILE[3].replace("https", "https\u200b") in said.replace("&#8203;", "\u200b")
    assert len(plain.all("table")) == 2
    assert len(plain.all("h1")) == 1
    assert len({len(row) for row in _rows(parser.render(text))}) <= 2
    for letter in ("\u202e", "\x00", "\x1b"):
        assert letter not in text
    written = [line for line in text.splitlines() if not line.startswith("- Command: `")]
    assert not re.search("<(?!/?bdi>)", "\n".join(written))


def _rows(html_text: str) -> list[list[str]]:
    return [re.findall("<td>", row) for row in html_text.split("<tr>")[1:] if "<td>" in row]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a|b", r"a\|b"),
        ("<b>", "&lt;b&gt;"),
        ("", "∅"),
        ("*x*_y_", r"\*x\*\_y\_"),
        ("https://x.y", "https&#8203;://x.y"),
        ("a\nb", "a↵b"),
        ("`x`", r"\`x\`"),
    ],
)
def test_markdown_text(value, text):
    assert markdown_text(value) == text


def test_code_spans_hold_any_backticks():
    assert code_span("melens check a") == "`melens check a`"
    assert code_span("a ``b`` c") == "``` a ``b`` c ```"


@pytest.mark.parametrize(
    ("value", "style", "text"),
    [
        (24926.3, "plain", "24,926"),
        (11, "plain", "11"),
        (0.55123, "percent", "55.1 %"),
        (1.0, "percent", "100 %"),
        (-2e-4, "percent", "0.0 %"),
        (0.0041, "signed", "+0.0041"),
        (None, "plain", "none"),
        (-713.25, "plain", "-713.2"),
        (True, "plain", "yes"),
        (1e-7, "plain", "1e-07"),
        (65504, "plain", "65,504"),
        ("single", "plain", "single"),
    ],
)
def test_number_text(value, style, text):
    assert number_text(value, style) == text


def test_page_text_names_what_cannot_be_seen():
    assert str(page_text("a\u202eb\x00<")) == "a\\u202eb\\x00&lt;"
    assert str(page_text("x שלום 5")) == "x <bdi>שלום</bdi> 5"


def test_pointers_escape_and_refuse():
    source = Addressed({"a/b": {"c~d": [1.5]}})
    assert source.at("/a~1b/c~0d/0") == 1.5
    assert anchor("/a b/é") == "json/a%20b/%C3%A9"
    assert look_up(source.data, "") == source.data
    for pointer in ("/x", "/a~1b/c~0d/7", "/a~1b/c~0d/x", "/a~1b/c~0d/-1", "/a~1b/c~0d/00", "a~1b"):
        with pytest.raises(ResultError, match="nothing is at"):
            source.number(pointer)


def test_three_files_are_written_and_the_json_is_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "html_page", lambda report: html("gemma"))
    paths = write_report(made("gemma"), tmp_path / "out")
    assert [path.name for path in paths] == ["report.html", "report.md", "report.json"]
    assert load_result(paths[2]) == made("gemma")
    assert paths[0].read_text("utf-8") == html("gemma")
    assert paths[1].read_text("utf-8") == markdown_report(made("gemma"))
    assert sorted(tmp_path.rglob("*")) == sorted([tmp_path / "out", *paths])


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "html_page", lambda report: "")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_report(made("gemma"), tmp_path / "file" / "out")


def test_a_report_without_results_or_findings_is_a_page_too():
    held = {"locate": planted.saved("smollm2")["locate"]}
    small = planted.report(results=dict(held), findings=(), rules=())
    small = small.model_copy(update={"results": {}, "recommendation": None})
    text = Page(html_page(small)).all("main")[0]["text"]
    assert "Nothing was found that the policy has a word on." in text
    assert "Nothing was found" in markdown_report(small)


def test_a_kind_without_a_section_is_shown_as_it_is():
    path = planted.SAVED / "smollm2-135m-bos.passkey.long-context.json"
    held = {"locate": planted.saved("smollm2")["locate"], "passkey": load_result(path).to_dict()}
    held["attention"] = planted.maps(heads=1).to_dict()
    found = Page(html_page(planted.report(results=held)))
    assert "more" in found.ids()
    assert len(found.all("img")) == 2
    assert {section.kind for section in sections.SECTIONS.values()} >= {
        type(made("smollm2").result(name)) for name in made("smollm2").results
    }


def test_markdown_says_the_verdict_the_numbers_and_the_command():
    text = markdown_report(made("smollm2"))
    assert text.startswith("# melens check: ")
    assert "**Can I ship this? Not as it is: 1 critical finding under" in text
    assert text.index("Can I ship") < text.index("What to do now:") < text.index("✗ Findings: not")
    assert "| ME Layer (from 0) | 11 |" in text
    assert "| The massive token reaches | 24,926 |" in text
    assert "✗ critical" in text
    assert made("smollm2").run.command in text
    assert "Layers count from 0" in text
    assert len(text) < 6000


CARD = "---\nlicense: mit\ntags: [a]\n---\n# Model\n\nText\u2003with  spaces \n"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_a_card_keeps_every_byte_but_its_section(tmp_path, end, start):
    readme = tmp_path / "README.md"
    before = (start + CARD).replace("\n", end).encode()
    readme.write_bytes(before)
    readme.chmod(0o640)
    update_card(readme, made("smollm2"))
    first = readme.read_bytes()
    assert first.startswith(before)
    assert first.count(START.encode()) == first.count(END.encode()) == 1
    assert end == "\n" or b"\n" not in first.replace(b"\r\n", b"")
    assert readme.stat().st_mode & 0o777 == 0o640
    update_card(readme, made("smollm2"))
    assert readme.read_bytes() == first
    after = b"## After" + end.encode()
    readme.write_bytes(first + after)
    update_card(readme, made("gemma"))
    second = readme.read_bytes()
    assert second.startswith(before)
    assert second.endswith(after)
    assert b"gemma" in second
    assert made("smollm2").answer.encode() not in second
    update_card(readme, made("smollm2"))
    assert readme.read_bytes() == first + after


def test_a_hostile_report_cannot_end_its_section(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(CARD)
    update_card(readme, made("hostile"))
    first = readme.read_bytes()
    update_card(readme, made("hostile"))
    assert readme.read_bytes() == first


def test_a_card_without_a_section_is_no_bad_card(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(CARD)
    refuse_bad_card(readme)
    assert readme.read_text() == CARD


def test_an_empty_or_linked_card_works(tmp_path):
    readme, link = tmp_path / "README.md", tmp_path / "link.md"
    readme.write_bytes(b"")
    link.symlink_to(readme)
    update_card(link, made("gemma"))
    assert link.is_symlink()
    assert readme.read_text("utf-8").startswith(START)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (f"{START}\n", "1 line .* and 0 lines"),
        (f"{END}\n{START}\n", "in this order"),
        (f"{START}\n{END}\n{START}\n{END}\n", "2 lines"),
    ],
)
def test_a_card_with_broken_markers_is_refused_untouched(tmp_path, text, match):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ResultError, match=match):
        update_card(readme, made("gemma"))
    with pytest.raises(ResultError, match=match):
        refuse_bad_card(readme)
    assert readme.read_text() == text


def test_a_card_that_is_missing_or_no_text_is_refused(tmp_path):
    with pytest.raises(ResultError, match=r"cannot read .*README\.md: No such file.*; give the"):
        update_card(tmp_path / "README.md", made("gemma"))
    (tmp_path / "README.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResultError, match="not UTF-8"):
        update_card(tmp_path / "README.md", made("gemma"))


def test_the_published_schema_is_the_present_one():
    text = (DOCS / "report.schema.json").read_text("utf-8")
    assert json.loads(text) == json_schema(), "write it again: see docs/report.schema.json"


@pytest.mark.parametrize("which", ALL)
def test_reports_fit_the_schema_and_broken_ones_do_not(which):
    import jsonschema

    check = jsonschema.Draft202012Validator(json_schema())
    data = json.loads(made(which).to_json())
    assert list(check.iter_errors(data)) == []
    data["results"]["locate"]["me_layer"] = "eleven"
    assert list(check.iter_errors(data))
    data["results"]["locate"]["me_layer"] = 11
    data["findings"][0]["extra"] = 1
    assert list(check.iter_errors(data))
