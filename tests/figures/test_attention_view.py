from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from melens.errors import OutputError, ResultError
from melens.figures import attention_view as module
from melens.figures.attention_view import (
    FRAME_HEIGHT,
    HtmlView,
    attention_view,
)
from melens.provenance import RunInfo
from melens.results import AttentionMaps, HeadMap, TokenNorms
from melens.results.attention import MOST_HEADS, MOST_TOKENS, most_heads

HOSTILE = (
    "<script>alert(1)</script>",
    "</div>",
    "</script><script>document.title='hacked'</script>",
    "<img/src='x'/onerror=\"document.title='hacked'\">",
    '"><svg/onload=alert(1)>',
    "<a b='c'> & d",
    "&lt;b&gt;",
    "<!--",
    "${alert(1)}",
)
PLAIN = ("My", " favorite", " color", "\n", "    ", "中")


def _run(**changes: str | dict[str, str]) -> RunInfo:
    facts = {
        "model": "planted",
        "model_revision": None,
        "weights": "0123",
        "dtype": "float32",
        "device": "cpu",
        "seed": 0,
        "settings": {},
        "command": "melens attention planted",
        "versions": {"python": "3.11.7", "melens": "0.1.0"},
        "git": "0e1e009",
        "created": "2025-01-01T00:00:00+00:00",
    }
    return RunInfo.model_validate(facts | changes)


def _head(n: int, layer: int, head: int) -> HeadMap:
    """Query 0 sees itself; later ones give 0.65432 to token 0 and share the rest."""
    rows = ((1.0,), *((0.6543, *((0.3457 / i,) * i)) for i in range(1, n)))
    return HeadMap(layer=layer, head=head, rows=rows)


def _maps(tokens=PLAIN, at=((2, 0), (2, 1), (4, 7)), layers=(1, 2), **changes):
    n = len(tokens)
    sizes = (24133.0, *(10.0 + i for i in range(1, n)))
    facts = {
        "tokens": tuple(tokens),
        "me_layer": 1,
        "massive_positions": (0,),
        "heads": tuple(_head(n, layer, head) for layer, head in at),
        "norms": tuple(TokenNorms(layer=layer, norms=sizes) for layer in layers),
        "run": _run(),
    }
    return AttentionMaps(**(facts | changes))


class Page(HTMLParser):
    """What a parser other than the browser makes of a page."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self.scripts, self._open = [], "", [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "script":
            self.scripts.append([dict(attrs), ""])

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "script" in self._open:
            self.scripts[-1][1] += data
        elif "style" not in self._open:
            self.text += data

    def props(self) -> dict:
        return {
            attrs["id"].removesuffix("-props"): json.loads(data)
            for attrs, data in self.scripts
            if attrs.get("type") == "application/json"
        }

    def code(self) -> list[str]:
        return [data for attrs, data in self.scripts if "type" not in attrs]

    def policy(self) -> str:
        metas = [attrs for tag, attrs in self.tags if tag == "meta"]
        assert metas[1]["http-equiv"] == "Content-Security-Policy"
        return metas[1]["content"]


def test_the_data_in_the_page_are_the_results_rounded_to_three_digits():
    maps = _maps()
    props = Page(attention_view(maps).html).props()
    assert list(props) == ["norms-0", "norms-1", "layer-2", "layer-4"]
    assert props["layer-2"]["attentionHeadNames"] == ["L2H0", "L2H1"]
    assert props["layer-4"]["attentionHeadNames"] == ["L4H7"]
    n = len(maps.tokens)
    for name, heads in (("layer-2", maps.heads[:2]), ("layer-4", maps.heads[2:])):
        for got, head in zip(props[name]["attention"], heads, strict=True):
            assert [len(row) for row in got] == [n] * n
            for i in range(n):
                for j in range(n):
                    assert got[i][j] == (float(f"{head.rows[i][j]:.3f}") if j <= i else 0)
    assert props["layer-2"]["attention"][0][1][:2] == [0.654, 0.346]
    logs = [float(f"{math.log10(norm):.3f}") for norm in maps.norms[0].norms]
    assert props["norms-0"]["values"] == logs
    assert logs[0] == 4.383


def test_norm_colours_share_one_scale_and_a_zero_norm_is_no_infinity():
    def props(*layers):
        norms = tuple(TokenNorms(layer=i, norms=sizes) for i, sizes in enumerate(layers))
        found = Page(attention_view(_maps(tokens="ab", norms=norms)).html).props()
        values = [found[f"norms-{i}"]["values"] for i in range(len(layers))]
        (scale,) = {
            (found[f"norms-{i}"]["minValue"], found[f"norms-{i}"]["maxValue"])
            for i in range(len(layers))
        }
        return values, scale

    assert props((0.0, 0.001), (100_000.0, 1.0)) == ([[-3, -3], [5, 0]], (-3, 5))
    assert props((0.0, 0.0)) == ([[0, 0]], (-1, 1))


def test_without_norms_the_text_is_plain():
    page = attention_view(_maps(tokens=("a", "<b>"), norms=())).html
    assert "ColoredTokens" not in Page(page).text
    assert "<span>a</span><span>&lt;b&gt;</span>" in page


def test_tokens_that_show_nothing_are_made_visible():
    tokens = ("\n", "\t", "   ", " the", "a\u2028b", "\u202eabc", "\x00", "\xa0", "x" * 40, "")
    props = Page(attention_view(_maps(tokens=tokens)).html).props()
    assert props["norms-0"]["tokens"] == [
        "↵",
        "⇥",
        "···",
        " the",
        "a\\u2028b",
        "\\u202eabc",
        "\\x00",
        "\\xa0",
        "x" * 40,
        "",
    ]
    labels = props["layer-2"]["tokens"]
    assert labels[2:4] == ["···", "·the"]
    assert labels[8] == "x" * 13 + "…"


def test_hostile_text_stays_text():
    tokens = (*HOSTILE, "\u2028", "\u2029", "</SCRIPT>")
    bad = "</title></style><script>document.title='hacked'</script>\u2028'\"&"
    run = _run(model=bad, command=bad, dtype=bad, versions={"x": bad}, created=bad, device=bad)
    positions = tuple(range(len(tokens)))
    view = attention_view(_maps(tokens=tokens, run=run, massive_positions=positions))
    page = Page(view.html)
    assert len(page.code()) == 2
    assert len(page.scripts) == 2 + 4
    assert {tag for tag, _ in page.tags} == {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "h3",
        "p",
        "b",
        "br",
        "noscript",
        "div",
        "script",
        "footer",
        "code",
    }
    for token in (*HOSTILE, "</SCRIPT>", bad.replace("\u2028", "\\u2028")):
        assert token in page.text
    # The component writes its tokens as HTML: what it gets must be that text's HTML.
    got = page.props()["norms-0"]["tokens"]
    assert [html.unescape(token) for token in got[: len(HOSTILE)]] == list(HOSTILE)
    assert not any("<" in token for token in got)
    for attrs, data in page.scripts:
        if attrs:
            assert "<" not in data
            assert data.isascii()
    assert "\u2028" not in view.html
    assert "\u2029" not in view.html
    assert bad not in view._repr_html_()


def test_one_bundle_a_page_and_nothing_is_fetched():
    page = Page(attention_view(_maps()).html)
    bundle, boot = page.code()
    assert len(bundle) > 1_000_000
    assert bundle.startswith('"use strict";var CircuitsVis=')
    assert "sourceMappingURL" not in bundle
    assert not re.search(r"<(?:/?script|!--)", bundle, re.IGNORECASE)
    assert len(boot) < 500
    for tag, attrs in page.tags:
        assert not {"src", "href", "srcset", "data", "action"} & set(attrs), tag


def test_the_policy_allows_these_two_scripts_and_no_network():
    page = Page(attention_view(_maps()).html)
    parts = dict(part.split(maxsplit=1) for part in page.policy().split("; "))
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
        for code in page.code()
    ]
    assert parts.pop("script-src").split() == hashes
    assert parts == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data: blob:",
        "font-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_the_page_says_what_it_shows():
    text = Page(attention_view(_maps()).html).text
    for part in (
        "Attention in planted",
        "ME Layer: 1 (counted from 0, at the block output)",
        "Massive positions: 0 “My” (counted from 0)",
        _maps().summary(),
        "log10",
        "Output of layer 1 (counted from 0)",
        "Norms from 11 to 24,133, the largest at position 0.",
        "Layer 4 (counted from 0)",
        "need JavaScript",
        "melens attention planted",
        "python 3.11.7, melens 0.1.0, circuitsvis 1.",
        "float32 on cpu; git 0e1e009",
    ):
        assert part in text
    text = Page(attention_view(_maps(me_layer=None, massive_positions=())).html).text
    assert "ME Layer: none found (counted" in text
    assert "Massive positions: none in this text" in text


def test_pages_that_no_browser_can_draw_are_refused():
    with pytest.raises(ResultError, match=r"129 tokens are more than a page can show \(128\); m"):
        attention_view(_maps(tokens=["a"] * (MOST_TOKENS + 1)))
    assert most_heads(MOST_TOKENS) == 30
    heads = (_head(MOST_TOKENS, 0, 0),) * 31
    with pytest.raises(ResultError, match=r"31 heads are more .* at 128 tokens \(30\); choose few"):
        attention_view(_maps(tokens="a" * MOST_TOKENS, heads=heads))
    heads = (_head(2, 0, 0),) * (MOST_HEADS + 1)
    with pytest.raises(ResultError, match=r"301 heads .* at 2 tokens \(300\)"):
        attention_view(_maps(tokens="ab", heads=heads))


def test_the_largest_pages_stay_far_below_twenty_megabytes():
    for tokens, heads in ((["\n"] * 128, 30), (["中文"] * 40, 300)):
        maps = _maps(tokens=tokens, at=[(i, 0) for i in range(heads)], layers=range(100))
        assert len(attention_view(maps).html) < 10e6


def test_a_page_is_saved_as_html_only(tmp_path):
    view = attention_view(_maps())
    for name in ("a.html", "b.HTM"):
        assert view.save_html(str(tmp_path / name)) == tmp_path / name
        assert (tmp_path / name).read_text("utf-8") == view.html
    with pytest.raises(ResultError, match=r"'.*page\.json'; end it in \.html or \.htm\."):
        view.save_html(tmp_path / "page.json")
    with pytest.raises(OutputError, match="cannot write"):
        view.save_html(tmp_path / "a.html" / "b.html")


def test_open_shows_a_saved_copy(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(module.webbrowser, "open", seen.append)
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    view = _maps().view()
    path = view.open()
    assert path.read_text("utf-8") == view.html
    assert path.is_relative_to(tmp_path)
    assert seen == [path.as_uri()]


def test_a_notebook_gets_a_sandboxed_frame_and_a_short_repr():
    view = attention_view(_maps(run=_run(model='a"b<c>')))
    assert isinstance(view, HtmlView)
    assert repr(view) == '<HtmlView: attention in a"b<c>, 1.3 MB>'
    frame = Page(view._repr_html_())
    ((tag, attrs),) = frame.tags
    assert tag == "iframe"
    assert attrs["sandbox"] == "allow-scripts"
    assert attrs["srcdoc"] == view.html
    assert attrs["title"] == view.title
    assert f"height: {FRAME_HEIGHT}px" in attrs["style"]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A circuitsvis that must not be imported; returns where its bundle belongs."""
    package = tmp_path / "circuitsvis"
    (package / "dist" / "cdn").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "circuitsvis", raising=False)
    return package / "dist" / "cdn" / "iife.js"


def test_no_script_in_the_bundle_can_end_the_element(fake):
    fake.write_text("a='</script><script>b</SCRIPT >';\nc='<!--'\n//# sourceMappingURL=x.map\n")
    page = Page(attention_view(_maps()).html)
    assert page.code()[0] == ("a='\\x3c/script>\\x3cscript>b\\x3c/SCRIPT >';\nc='\\x3c!--'\n")
    assert len(page.code()) == 2


def test_without_circuitsvis_the_error_says_what_to_install(fake, monkeypatch):
    with pytest.raises(OutputError, match=r"not its dist/cdn/iife\.js; run `pip install --force-"):
        attention_view(_maps())
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OutputError, match=r"needs circuitsvis; run `pip install circuitsvis`\."):
        attention_view(_maps())


def _open(browser, path: Path, canvases: int) -> None:
    browser.get(path.as_uri())
    _wait(browser, canvases)


def _wait(browser, canvases: int) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    count = "return document.querySelectorAll('canvas').length"
    WebDriverWait(browser, 60).until(lambda b: b.execute_script(count) >= canvases)
    browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 200))")


def _errors(browser) -> list[str]:
    return [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"]


def _requests(browser) -> set[str]:
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }


def _shows(browser) -> dict:
    """Sizes and bluest pixels of all canvases, texts of all coloured tokens."""
    return browser.execute_script("""
      const bluest = canvas => {
        const rgba = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        let most = 0;
        for (let i = 0; i < rgba.length; i += 4)
          if (rgba[i + 3] === 255) most = Math.max(most, rgba[i + 2] - rgba[i]);
        return most;
      };
      return {
        sizes: [...document.querySelectorAll("canvas")].map(c => [c.clientWidth, c.clientHeight]),
        blue: [...document.querySelectorAll("canvas")].map(bluest),
        tokens: [...document.querySelectorAll(".colored-tokens")].map(
          box => [...box.querySelectorAll(":scope > span > span")].map(s => s.textContent)),
        colours: [...document.querySelectorAll(".colored-tokens")].map(
          box => [...box.querySelectorAll(":scope > span > span")].map(
            s => getComputedStyle(s).backgroundColor)),
        title: document.title,
        text: document.body.innerText,
      };
    """)


@pytest.mark.browser
def test_browser_draws_every_layer_and_head_without_the_network(browser, tmp_path):
    maps = _maps()
    path = attention_view(maps).save_html(tmp_path / "page.html")
    _open(browser, path, 3 + 2)
    shows = _shows(browser)
    assert len(shows["sizes"]) == 3 + 2
    assert min(min(size) for size in shows["sizes"]) > 60
    assert max(size[0] for size in shows["sizes"]) > 500
    assert min(shows["blue"]) > 250
    assert shows["tokens"] == [["My", "\xa0favorite", "\xa0color", "↵", "····", "中"]] * 2
    assert shows["colours"][0][0] == "rgb(0, 0, 255)"
    assert len(set(shows["colours"][0][1:])) == 5
    assert shows["title"] == "attention in planted"
    for part in ("L2H0", "L2H1", "L4H7", "L4H7 Zoomed", "Layer 4 (counted from 0)"):
        assert part in shows["text"]
    assert "need JavaScript" not in shows["text"]
    assert _errors(browser) == []
    requests = _requests(browser)
    assert path.as_uri() in requests
    assert {url.split(":")[0] for url in requests} <= {"file", "data", "blob"}
    assert [url for url in requests if url.startswith("file:")] == [path.as_uri()]


@pytest.mark.browser
def test_browser_enlarges_the_head_it_points_at(browser, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    _open(browser, attention_view(_maps()).save_html(tmp_path / "page.html"), 5)
    second = browser.find_elements(By.TAG_NAME, "canvas")[1]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", second)
    assert "L2H0 Zoomed" in _shows(browser)["text"]
    ActionChains(browser).move_to_element(second).click().perform()
    assert "L2H1 Zoomed" in _shows(browser)["text"]
    assert _errors(browser) == []


@pytest.mark.browser
def test_browser_shows_hostile_tokens_as_text(browser, tmp_path):
    from selenium.common.exceptions import NoAlertPresentException
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    bad = "</title><script>document.title='hacked'</script>"
    maps = _maps(tokens=HOSTILE, run=_run(model=bad, command=bad))
    _open(browser, attention_view(maps).save_html(tmp_path / "page.html"), 5)
    for place in (".colored-tokens span span", "canvas"):  # tooltips are written on demand
        ActionChains(browser).move_to_element(
            browser.find_element(By.CSS_SELECTOR, place)
        ).perform()
        browser.execute_async_script("setTimeout(arguments[0], 100)")
    shows = _shows(browser)
    assert shows["title"] == f"attention in {bad}"
    assert shows["tokens"][0] == [token.replace(" ", "\xa0") for token in HOSTILE]
    assert bad in shows["text"]
    with pytest.raises(NoAlertPresentException):
        _ = browser.switch_to.alert
    made = browser.execute_script(
        "return [document.scripts.length, document.querySelectorAll('img, svg').length]"
    )
    assert made == [2 + 4, 0]
    assert _errors(browser) == []  # nothing was even blocked
    assert {url.split(":")[0] for url in _requests(browser)} <= {"file", "data", "blob"}


@pytest.mark.browser
def test_browser_does_not_run_tokens_even_if_they_became_html(browser, tmp_path):
    page = attention_view(_maps(tokens=HOSTILE)).html
    broken = page.replace("&lt;", "\\u003c").replace("&gt;", ">")  # as if nobody had escaped
    path = tmp_path / "broken.html"
    path.write_text(broken, "utf-8")
    _open(browser, path, 5)
    assert browser.execute_script("return document.images.length") > 0
    assert _shows(browser)["title"] == "attention in planted"
    assert any("inline event handler" in error for error in _errors(browser))


@pytest.mark.browser
def test_browser_draws_the_notebook_frame_and_keeps_it_apart(browser, tmp_path):
    view = attention_view(_maps(tokens=(*PLAIN, *HOSTILE)))
    path = tmp_path / "notebook.html"
    path.write_text(f"<title>notebook</title><p>cell</p>{view._repr_html_()}<p>next</p>", "utf-8")
    browser.get(path.as_uri())
    frame = browser.find_element("tag name", "iframe")
    assert frame.size["height"] == FRAME_HEIGHT
    assert frame.size["width"] > 1000
    browser.switch_to.frame(frame)
    _wait(browser, 5)
    shows = _shows(browser)
    assert min(min(size) for size in shows["sizes"]) > 60
    assert min(shows["blue"]) > 250
    assert shows["tokens"][0][-3:] == ["&lt;b&gt;", "<!--", "${alert(1)}"]
    browser.execute_async_script("setTimeout(arguments[0], 1500)")
    assert _shows(browser)["sizes"] == shows["sizes"]  # they do not shrink
    assert _errors(browser) == []
    reach = "try { return parent.document.title } catch (error) { return error.name }"
    assert browser.execute_script(reach) == "SecurityError"
    browser.switch_to.default_content()
    assert browser.title == "notebook"
    assert {url.split(":")[0] for url in _requests(browser)} <= {"file", "data", "blob", "about"}


@pytest.mark.browser
def test_browser_follows_dark_mode_and_says_when_script_is_off(browser, tmp_path):
    path = attention_view(_maps()).save_html(tmp_path / "page.html")
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    _open(browser, path, 5)
    colours = browser.execute_script("""
      return [document.body, ...document.querySelectorAll(".panel")].map(
        element => getComputedStyle(element).backgroundColor)
    """)
    assert colours == ["rgb(23, 25, 28)", *["rgb(255, 255, 255)"] * 4]
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    browser.get(path.as_uri())
    text = browser.find_element("tag name", "body").text
    assert "The drawings below need JavaScript, which is off." in text
