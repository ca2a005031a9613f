"""attention_view(): saved attention maps as one HTML page that works offline.

circuitsvis draws, but only its JavaScript is used, with data of our own. Its Python functions
ask the internet whether it is there and write tokens into the page unescaped.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import json
import math
import re
import tempfile
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path

from melens.errors import OutputError, ResultError
from melens.formatting import printable
from melens.protocols import JsonObject
from melens.results.attention import MOST_TOKENS, AttentionMaps, HeadMap, TokenNorms, most_heads
from melens.store import digest, write_atomically

FRAME_HEIGHT = 800
"""Pixels a notebook cell gives to the page. Fixed, because circuitsvis' maps follow the size of
their frame: in a frame that follows its content they shrink without end."""

_DIGITS = 3
_LABEL_LENGTH = 14
"""Longest token beside a map; longer ones would leave no room for the map."""
_MARKS = str.maketrans({"\n": "↵", "\r": "␍", "\t": "⇥"})

DRAW_PANELS = """
function drawPanels() {
  for (const panel of document.querySelectorAll("[data-component]")) {
    const draw = () => {
      const props = JSON.parse(document.getElementById(panel.id + "-props").textContent);
      CircuitsVis.render(panel.id, CircuitsVis[panel.dataset.component], props);
    };
    const folded = panel.closest("details:not([open])");
    if (folded) folded.addEventListener("toggle", draw, { once: true });
    else draw();
  }
}
"""
"""Draws every panel of a page, a folded one when it is opened: before, it has no size."""
BOOT = f"{DRAW_PANELS}drawPanels();\n"
"""The same at once, after bundle()."""
PANEL_STYLE = """
.panel { color-scheme: light; background: #fff; color: #1a1a1a; padding: .8rem;
  border: 1px solid var(--rule); border-radius: 6px; }
/* circuitsvis' own headings and widths: small maps large enough to tell apart, the enlarged one
   low enough to be seen whole. */
.panel h2, .panel h3 { font-size: 1rem; margin-top: 0; }
.panel h4 { font-size: .7rem; font-weight: normal; line-height: 1.2;
  background: #fff !important; color: #1a1a1a !important; }
.panel > div > h3 + div > div { flex: 0 0 6.6rem !important; width: 6.6rem !important;
  max-width: none !important; }
.panel > div > div:nth-of-type(2) { max-width: 50rem; }
"""
"""Of any page that holds panels; it sets ``--rule``, the colour of a border."""
_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1a1a1a; --soft: #5a5a5a; --rule: #d5d5d5; }
@media (prefers-color-scheme: dark) {
  :root { --page: #17191c; --ink: #e8e8e8; --soft: #a9adb3; --rule: #3d4147; }
}
body { margin: 0 auto; padding: 1rem 1.5rem; max-width: 62rem; overflow-wrap: anywhere;
  background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.25; }
h2 { margin-top: 2rem; }
.note, footer { color: var(--soft); font-size: .9rem; }
.text span { border: 1px solid var(--rule); white-space: pre-wrap; }
footer { border-top: 1px solid var(--rule); margin-top: 2rem; }
"""


@dataclass(frozen=True, repr=False)
class HtmlView:
    """One self-contained HTML page: save it, open it, or let a notebook show it."""

    html: str
    title: str

    def save_html(self, path: Path | str) -> Path:
        """Write the page atomically.

        Raises:  ResultError: an ending other than .html or .htm.
                 OutputError: a folder that cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() not in (".html", ".htm"):
            raise ResultError(f"cannot save a page as {str(path)!r}; end it in .html or .htm.")
        write_atomically(path, self.html)
        return path

    def open(self) -> Path:
        """Write the page into a new temporary folder and show it in the web browser, if any."""
        path = self.save_html(Path(tempfile.mkdtemp(prefix="melens-")) / "attention.html")
        webbrowser.open(path.as_uri())
        return path

    def __repr__(self) -> str:
        return f"<HtmlView: {printable(self.title)}, {len(self.html) / 1e6:.1f} MB>"

    def _repr_html_(self) -> str:
        """A sandboxed frame: script and style of the page cannot reach the notebook."""
        return (
            f'<iframe sandbox="allow-scripts" title="{_text(self.title)}" '
            f'style="width: 100%; height: {FRAME_HEIGHT}px; border: 0" '
            f'srcdoc="{html.escape(self.html)}"></iframe>'
        )


def attention_view(maps: AttentionMaps) -> HtmlView:
    """Attention and residual norms, drawn by circuitsvis: one page that works offline.

    Raises:  ResultError: more tokens or heads than a page can show.
             OutputError: circuitsvis is not installed, or not whole.
    """
    _refuse_what_no_page_can_show(maps)
    code, version = bundle()
    title = f"attention in {maps.run.subject}"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{content_policy(code, BOOT)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title>",
        f"<style>{_STYLE}{PANEL_STYLE}</style></head><body>",
        _heading(maps),
        _norms(maps) if maps.norms else _plain(maps),
        _attention(maps),
        _footer(maps, version),
        f"<script>{code}</script>",
        f"<script>{BOOT}</script>",
        "</body></html>\n",
    ]
    return HtmlView(html="\n".join(parts), title=title)


def _refuse_what_no_page_can_show(maps: AttentionMaps) -> None:
    n, heads = len(maps.tokens), len(maps.heads)
    if n > MOST_TOKENS:
        raise ResultError(
            f"{n} tokens are more than a page can show ({MOST_TOKENS}); "
            "measure attention on a shorter text."
        )
    limit = most_heads(n)
    if heads > limit:
        raise ResultError(
            f"{heads} heads are more than a page can show at {n} tokens ({limit}); "
            "choose fewer layers or heads, or a shorter text."
        )


def _heading(maps: AttentionMaps) -> str:
    me_layer = "none found" if maps.me_layer is None else f"{maps.me_layer}"
    massive = ", ".join(f"{at} “{_text(shown(maps.tokens[at]))}”" for at in maps.massive_positions)
    return (
        f"<h1>Attention in {_text(maps.run.subject)}</h1>\n<p>{_text(maps.summary())}.</p>\n"
        f"<p><b>ME Layer:</b> {me_layer} (counted from 0, at the block output)<br>\n"
        f"<b>Massive positions:</b> {massive or 'none in this text'} (counted from 0)</p>\n"
        "<noscript><p><b>The drawings below need JavaScript, which is off.</b> "
        "Their numbers are in the JSON of the result.</p></noscript>"
    )


def _norms(maps: AttentionMaps) -> str:
    """The text once a layer, on one colour scale; a norm of 0 counts as the smallest other one."""
    floor = min((norm for layer in maps.norms for norm in layer.norms if norm > 0), default=1.0)
    logs = [
        [round(math.log10(max(norm, floor)), _DIGITS) for norm in layer.norms]
        for layer in maps.norms
    ]
    # circuitsvis writes the tokens of this component into the page as HTML: escape them for that.
    # Its tooltips take them as text, so there the escape shows; ">" needs none.
    tokens = [shown(token).replace("&", "&amp;").replace("<", "&lt;") for token in maps.tokens]
    low, high = min(-1.0, *map(min, logs)), max(1.0, *map(max, logs))
    blue = max(10.0, *(max(layer.norms) for layer in maps.norms))
    parts = [
        "<h2>Residual norms</h2>\n<p class=note>Colour is log10 of the norm of a token's residual, "
        "because norms span orders of magnitude: white is a norm of 1, full blue "
        f"{_number(blue)}, red less than 1, the same in all layers. Pointing at a token shows "
        "its log10 (and &lt; as &amp;lt;). A token of spaces is shown as ·, a line break as ↵.</p>"
    ]
    for i, (layer, values) in enumerate(zip(maps.norms, logs, strict=True)):
        parts.append(f"<h3>Output of layer {layer.layer} (counted from 0)</h3>{_range(layer)}")
        props = {"tokens": tokens, "values": values, "minValue": low, "maxValue": high}
        parts.append(_panel(f"norms-{i}", "ColoredTokens", props))
    return "\n".join(parts)


def _range(layer: TokenNorms) -> str:
    low, high = _number(min(layer.norms)), _number(max(layer.norms))
    at = layer.norms.index(max(layer.norms))
    return f"<p class=note>Norms from {low} to {high}, the largest at position {at}.</p>"


def _plain(maps: AttentionMaps) -> str:
    tokens = "".join(f"<span>{_text(shown(token))}</span>" for token in maps.tokens)
    return f"<h2>Text</h2>\n<p class=text>{tokens}</p>"


def _attention(maps: AttentionMaps) -> str:
    """One section a layer; small maps to choose from, one of them enlarged."""
    sunk = any(head.learned for head in maps.heads)
    parts = [
        "<h2>Attention</h2>\n<p class=note>A row is a token that attends (destination), a column a "
        "token attended to (source), both with their position. White is 0, full blue 1, grey lies "
        "ahead of the token and cannot be seen. L11H3 is query head 3 of layer 11, both counted "
        "from 0. A space is shown as ·."
        + (f" The column {SINK} is what a learned logit takes of each row." if sunk else "")
        + "</p>"
    ]
    for layer in sorted({head.layer for head in maps.heads}):
        heads = [head for head in maps.heads if head.layer == layer]
        parts.append(f"<h3>Layer {layer} (counted from 0)</h3>")
        parts.append(heads_panel(f"layer-{layer}", maps.tokens, heads))
    return "\n".join(parts)


def heads_panel(name: str, tokens: Sequence[str], heads: Sequence[HeadMap]) -> str:
    """HTML of one circuitsvis view of several heads over the same tokens.

    Args:    name: its id, of letters, digits and hyphens; the page also needs bundle() and BOOT.
    """
    sunk = any(head.learned for head in heads)
    props = {
        "tokens": [SINK] * sunk + [_label(token) for token in tokens],
        "attention": [_square(head, sunk=sunk) for head in heads],
        "attentionHeadNames": [f"L{head.layer}H{head.head}" for head in heads],
        "minValue": -1,
        "maxValue": 1,
    }
    return _panel(name, "AttentionHeads", props)


def _square(head: HeadMap, *, sunk: bool) -> list[list[float]]:
    """The head's rows; a learned sink is a column in front, and a row that attends to nothing."""
    n = len(head.rows)
    square = [[round(v, _DIGITS) for v in row] + [0] * (n - len(row)) for row in head.rows]
    if not sunk:
        return square
    taken = head.learned or (0.0,) * n
    return [[0.0] * (n + 1), *([taken[i], *row] for i, row in enumerate(square))]


SINK = "(learned sink)"


def _panel(name: str, component: str, props: JsonObject) -> str:
    """A place for one circuitsvis component and, as data that no browser runs, what it is fed."""
    return (
        f'<div class="panel" id="{name}" data-component="{component}"></div>\n'
        f'<script type="application/json" id="{name}-props">{_json(props)}</script>'
    )


def _footer(maps: AttentionMaps, circuitsvis: str) -> str:
    run = maps.run
    versions = ", ".join(
        f"{k} {v}" for k, v in (run.versions | {"circuitsvis": circuitsvis}).items()
    )
    facts = f"{run.dtype} on {run.device}; git {run.git or 'none'}; {run.created}"
    return (
        f"<footer><p><code>{_text(run.command)}</code><br>\n{_text(versions)}<br>\n"
        f"{_text(facts)}</p></footer>"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def marked(value: str) -> str:
    """The text on one line, safe to show, with signs for line breaks and tabs."""
    return printable(value.translate(_MARKS))


def shown(token: str) -> str:
    """A token on its own: safe to show, and visible where it is only spaces."""
    if token.strip():
        return marked(token)
    dotted = token.replace(" ", "·").translate(_MARKS)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in dotted)


def _label(token: str) -> str:
    """A token beside a map, where circuitsvis drops spaces."""
    label = marked(token).replace(" ", "·")
    return label if len(label) <= _LABEL_LENGTH else label[: _LABEL_LENGTH - 1] + "…"


def _text(value: str) -> str:
    return html.escape(marked(value))


def _json(value: object) -> str:
    """ASCII JSON without ``<``: nothing in it can end the script element around it."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def content_policy(*scripts: str) -> str:
    """A Content-Security-Policy: no network, and no script but these.

    Text that becomes HTML by mistake still cannot run.
    """
    digests = [bytes.fromhex(digest([script], length=64)) for script in scripts]
    allowed = " ".join(f"'sha256-{base64.b64encode(made).decode()}'" for made in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'"
    )


def bundle() -> tuple[str, str]:
    """JavaScript of circuitsvis, safe inside a script element, and its version.

    The package is found, not imported: that would run its code.
    """
    spec = importlib.util.find_spec("circuitsvis")
    if spec is None:
        raise OutputError("this page needs circuitsvis; run `pip install circuitsvis`.")
    folder = resources.files(importlib.util.module_from_spec(spec))
    try:
        code = folder.joinpath("dist", "cdn", "iife.js").read_text("utf-8")
        version = metadata.version("circuitsvis")
    except (OSError, metadata.PackageNotFoundError):
        raise OutputError(
            "circuitsvis is here, but not its dist/cdn/iife.js; "
            "run `pip install --force-reinstall circuitsvis`."
        ) from None
    code = re.sub(r"\s*//# sourceMappingURL=\S*\s*$", "\n", code)
    return re.sub(r"<(?=/?script|!--)", r"\\x3c", code, flags=re.IGNORECASE), version
