"""The report in a real browser; marked ``browser`` like the other tests that need Chromium."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import planted_report as planted
import pytest

from melens.reporting import html_page

pytestmark = pytest.mark.browser
PHONE, DESKTOP = (390, 844), (1280, 1000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One page of each kind."""
    made = tmp_path_factory.mktemp("report")
    for name in ("smollm2", "gemma", "hostile"):
        (made / f"{name}.html").write_text(planted.page(name), "utf-8")
    return made


def _size(browser, size) -> None:
    width, height = size
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
    )


def _scheme(browser, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def _open(browser, path: Path, canvases: int) -> None:
    browser.get(path.as_uri())
    _wait(browser, canvases)


def _wait(browser, canvases: int) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    count = "return document.querySelectorAll('canvas').length"
    WebDriverWait(browser, 60).until(lambda b: b.execute_script(count) >= canvases)
    browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 300))")


def _errors(browser) -> list[str]:
    return [e["message"] for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]


def _requests(browser) -> set[str]:
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }


def _shot(browser, name: str) -> None:
    """A picture of the whole page for whoever wants to look, where SHOTS names a folder."""
    if folder := os.environ.get("SHOTS"):
        import base64

        found = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        Path(folder, f"{name}.png").write_bytes(base64.b64decode(found["data"]))


CANVASES = 9 + 1
"""Of the one layer that is not folded: its heads, and the one enlarged."""
UNFOLD = "document.querySelectorAll('.panels details').forEach(d => d.open = true)"
ALL_CANVASES = 3 * CANVASES


@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_everything_is_drawn_without_the_network(browser, folder, name):
    path = folder / f"{name}.html"
    _open(browser, path, CANVASES)
    count = "return document.querySelectorAll('canvas').length"
    assert browser.execute_script(count) == CANVASES
    browser.execute_script(UNFOLD)
    _wait(browser, ALL_CANVASES)
    shows = browser.execute_script("""
      const bluest = canvas => {
        const rgba = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        let most = 0;
        for (let i = 0; i < rgba.length; i += 4)
          if (rgba[i + 3] === 255) most = Math.max(most, rgba[i + 2] - rgba[i]);
        return most;
      };
      const all = what => [...document.querySelectorAll(what)];
      return {
        images: all("img").map(i => [i.complete, i.naturalWidth, i.clientWidth]),
        blue: all("canvas").map(bluest), sizes: all("canvas").map(c => c.clientWidth),
        resources: performance.getEntriesByType("resource").map(entry => entry.name.slice(0, 5)),
        names: all(".panel").map(panel => panel.innerText),
      };
    """)
    assert len(shows["images"]) == 9
    assert all(done and natural > 100 and wide > 200 for done, natural, wide in shows["images"])
    assert len(shows["blue"]) == ALL_CANVASES
    assert min(shows["blue"]) > 100
    assert min(shows["sizes"]) > 60
    assert "L12H0" in shows["names"][0]
    assert set(shows["resources"]) <= {"data:"}
    requests = _requests(browser)
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    assert _errors(browser) == []


CROPPED = """
  const boxes = document.querySelectorAll("figure:not(.large) .scroll, .scroll:has(.cards)");
  return [...boxes].filter(box => box.scrollWidth > box.clientWidth).map(box => box.ariaLabel);
"""
"""Figures, and tables that are not folded, of which a part is out of sight."""


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_never_scrolls_sideways(browser, folder, size, scheme):
    _size(browser, size)
    _scheme(browser, scheme)
    _open(browser, folder / "smollm2.html", CANVASES)
    measure = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    wide, room = browser.execute_script(measure)
    assert wide <= room
    assert room in (size[0], size[0] - 15)  # a scroll bar
    _shot(browser, f"{size[0]}-{scheme}")
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    wide, room = browser.execute_script(measure)
    assert wide <= room
    assert browser.execute_script(CROPPED) == []
    ink, paper = browser.execute_script(
        "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    )
    assert (ink, paper) == {
        "light": ("rgb(27, 30, 35)", "rgb(255, 255, 255)"),
        "dark": ("rgb(231, 233, 236)", "rgb(22, 24, 28)"),
    }[scheme]


def test_contents_details_and_numbers_work_by_keyboard(browser, folder):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    _open(browser, folder / "smollm2.html", CANVASES)
    press = ActionChains(browser)
    press.send_keys(Keys.TAB).perform()
    assert browser.switch_to.active_element.text == "Skip to the findings"
    assert browser.switch_to.active_element.rect["x"] >= 0  # seen once it has the focus
    press.send_keys(Keys.ENTER).perform()
    assert browser.switch_to.active_element.get_attribute("id") == "main"

    link = browser.find_element("css selector", "nav a[href='#sinks']")
    browser.execute_script("arguments[0].focus()", link)
    outline = browser.execute_script("return getComputedStyle(arguments[0]).outlineStyle", link)
    press.send_keys(Keys.ENTER).perform()
    browser.execute_async_script("setTimeout(arguments[0], 900)")
    top = "return document.getElementById('sinks').getBoundingClientRect().top"
    assert abs(browser.execute_script(top)) < 60
    assert browser.current_url.endswith("#sinks")
    assert outline in ("solid", "auto")

    assert "L12H4 Zoomed" not in browser.find_element("tag name", "main").text
    head = browser.find_element("css selector", "[aria-label='Enlarge L12H4']")
    browser.execute_script("arguments[0].focus()", head)
    press.send_keys(Keys.ENTER).perform()
    browser.execute_async_script("setTimeout(arguments[0], 200)")
    assert "L12H4 Zoomed" in browser.find_element("tag name", "main").text
    maps = browser.find_elements("css selector", ".panel canvas[aria-label$='L12H4 Zoomed']")
    assert len(maps) == 1
    browser.execute_script("arguments[0].focus()", link)

    box = browser.find_element("css selector", "#emergence ~ details, section details")
    assert box.get_attribute("open") is None
    browser.execute_script("arguments[0].querySelector('summary').focus()", box)
    press.send_keys(Keys.ENTER).perform()
    assert box.get_attribute("open") is not None

    number = browser.find_element("css selector", "section:has(#emergence) .facts a.n")
    browser.execute_script("arguments[0].focus()", number)
    press.send_keys(Keys.ENTER).perform()
    browser.execute_async_script("setTimeout(arguments[0], 900)")
    found = browser.execute_script("""
      const place = document.activeElement;
      return [place.id, place.closest("details").open, place.getBoundingClientRect().top,
              getComputedStyle(place).backgroundColor];
    """)
    assert found[0] == "json/results/locate/verdict"
    assert found[1]
    assert 0 < found[2] < 1000
    assert found[3] == "rgb(255, 241, 184)"
    assert _errors(browser) == []


def test_red_is_for_what_is_critical(browser, folder, tmp_path):
    """The first line by its level, in both schemes; warnings are amber."""
    colour = "return getComputedStyle(document.querySelector('.ship')).borderLeftColor"
    warned = planted.report(
        results={"locate": planted.saved("smollm2")["locate"]},
        findings=(planted.finding(severity="warning"),),
        recommendation=None,
        verdict="findings",
        policy=planted.checked("smollm2").policy.model_copy(update={"fail_on": "warning"}),
    )
    # without drawings of heads: the script that packs them has nothing to do
    warned = warned.model_copy(update={"results": {"locate": warned.results["locate"]}})
    (tmp_path / "warned.html").write_text(html_page(warned), "utf-8")
    seen = {}
    for name, path in (("critical", folder / "smollm2.html"), ("warned", tmp_path / "warned.html")):
        for scheme in ("light", "dark"):
            _scheme(browser, scheme)
            browser.get(path.as_uri())
            seen[name, scheme] = browser.execute_script(colour)
    assert seen == {
        ("critical", "light"): "rgb(165, 29, 45)",
        ("critical", "dark"): "rgb(255, 154, 159)",
        ("warned", "light"): "rgb(224, 138, 0)",
        ("warned", "dark"): "rgb(240, 169, 46)",
    }


def test_a_figure_is_enlarged_on_a_narrow_screen(browser, folder):
    _size(browser, PHONE)
    _open(browser, folder / "smollm2.html", CANVASES)
    button = browser.find_element("class name", "enlarge")
    image = browser.find_element("css selector", "figure:has(.enlarge) img")
    before = image.size["width"]
    browser.execute_script("arguments[0].click()", button)
    assert button.get_attribute("aria-pressed") == "true"
    assert before < 390 < 600 < image.size["width"]


def test_a_printer_gets_the_folded_tables_and_no_json(browser, folder):
    _open(browser, folder / "smollm2.html", CANVASES)
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    shown = browser.execute_script("""
      const seen = what => document.querySelector(what).getClientRects().length > 0;
      return [document.querySelectorAll("details.print[open]").length,
              seen("nav"), seen("#json"), seen(".panels"), seen("#emergence"), seen("img")];
    """)
    assert shown[0] >= 6
    assert shown[1:] == [False, False, False, True, True]
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    left = "return document.querySelectorAll('details.print[open]').length"
    assert browser.execute_script(left) == 0


def test_hostile_text_does_nothing_but_show(browser, folder):
    from selenium.webdriver.common.action_chains import ActionChains

    path = folder / "hostile.html"
    _open(browser, path, 3)
    ActionChains(browser).move_to_element(browser.find_element("tag name", "canvas")).perform()
    shows = browser.execute_script("""
      return {title: document.title, scripts: document.scripts.length,
              images: document.images.length, text: document.body.innerText,
              strange: document.querySelectorAll("b b, a:not([href^='#']), iframe, form").length,
              apart: [...document.querySelectorAll("bdi")].every(
                b => getComputedStyle(b).unicodeBidi.includes("isolate"))};
    """)
    assert shows["title"].startswith("melens check: a\"b'<c>`|↵</title></style><script>document.")
    assert (shows["scripts"], shows["images"], shows["strange"]) == (3 + 2, 4, 0)
    assert shows["apart"]
    for token in (*planted.HOSTILE[:5], "שלום עולם", "${alert(1)} {{ 7 * 7 }}"):
        assert token in shows["text"]
    assert _errors(browser) == []
    assert [url for url in _requests(browser) if not url.startswith("data:")] == [path.as_uri()]


def test_without_script_the_page_says_what_is_missing(browser, folder):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    browser.get((folder / "smollm2.html").as_uri())
    text = browser.find_element("tag name", "body").text
    assert "The drawings below need JavaScript, which is off." in text
    assert "Where massive activations emerge" in text


def _axe() -> str:
    """axe-core of the test extra, found, not imported."""
    spec = importlib.util.find_spec("axe_core_python")
    assert spec is not None, "pip install axe-core-python"
    assert spec.submodule_search_locations is not None
    given = os.environ.get("AXE")  # another version, for whoever wants to try
    path = Path(given or Path(spec.submodule_search_locations[0], "axe.min.js"))
    return path.read_text("utf-8")


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(browser, folder, scheme, size):
    _size(browser, size)
    _scheme(browser, scheme)
    _open(browser, folder / "smollm2.html", CANVASES)
    browser.execute_script(
        "document.querySelectorAll('main > section:not(#json) details').forEach(d => d.open = true)"
    )
    browser.execute_script(_axe())
    browser.set_script_timeout(120)
    found = browser.execute_async_script("""
      const done = arguments[0];
      // the JSON is thousands of spans of one kind: one piece of it stands for all
      const rest = [...document.querySelectorAll("#json details")].slice(1);
      axe.run({exclude: rest}, {resultTypes: ["violations"]}).then(
        result => done(result.violations.map(v => [v.impact, v.id, v.nodes.length,
                       v.nodes.slice(0, 3).map(n => n.html.slice(0, 150) + " @ " + n.target)])),
        error => done([["serious", String(error), 1, []]]));
    """)
    grave = [fault for fault in found if fault[0] in ("serious", "critical")]
    assert not grave, json.dumps(grave, indent=1)
    assert not found, json.dumps(found, indent=1)
