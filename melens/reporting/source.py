"""What a page is made of: numbers with an address, safe text, words explained."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from markupsafe import Markup, escape

from melens.figures.attention_view import marked, shown
from melens.protocols import JsonObject
from melens.results.base import look_up

_RIGHT = "\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff"
"""Blocks of scripts that run from right to left."""
_RUN = re.compile(f"([{_RIGHT}]+(?: +[{_RIGHT}]+)*)")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]#|~$])")
_LINKS = re.compile(r"(?i)\b(https?|ftp|mailto|www)(?=[:.])")
LONGEST = 2000
"""Characters of one text on a page; no name or sentence of ours comes near."""


def page_text(value: str) -> Markup:
    """HTML of a text: characters that show nothing are named, right-to-left runs kept apart."""
    pieces = _RUN.split(_short(value))
    made = [
        Markup("<bdi>{}</bdi>").format(piece) if i % 2 else escape(piece)
        for i, piece in enumerate(pieces)
    ]
    return Markup("").join(made)


def attribute_text(value: str) -> Markup:
    """The same for an attribute, where no element fits."""
    return escape(_short(value))


def token_html(token: str) -> Markup:
    """A token in a frame of its own, whatever way its script runs."""
    return Markup('<bdi class="token">{}</bdi>').format(shown(token) or "∅")


def markdown_text(value: str) -> str:
    """Markdown that shows this text and means nothing: no markup, no link, one line, any cell."""
    text = _short(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = _MARKDOWN.sub(r"\\\1", text)
    text = _LINKS.sub(r"\1&#8203;", text)
    return _RUN.sub(r"<bdi>\1</bdi>", text).strip() or "∅"


def _short(value: str) -> str:
    text = marked(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def number_text(value: object, style: str = "plain") -> str:
    """A number in words: ``plain``, ``percent`` (of a share) or ``signed``.

    None is "none". Thousands are grouped from 1,000 on; a whole number keeps all its digits.
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    if style == "percent":
        text = f"{100 * value:,.{0 if abs(value) >= 0.9995 else 1}f} %"
        return text.removeprefix("-") if text == "-0.0 %" else text
    sign = "+" if style == "signed" else ""
    if isinstance(value, int):
        return f"{value:{sign},}"
    if abs(value) >= 1000:
        return f"{value:{sign},.0f}"
    return f"{value:{sign}.4g}"


def code_span(value: str) -> str:
    """Markdown code that shows this text on one line, whatever backticks it holds."""
    text = _short(value)
    runs = re.findall("`+", text)
    fence = "`" * (1 + max(map(len, runs), default=0))
    return f"{fence} {text} {fence}" if runs or not text.strip() else f"{fence}{text}{fence}"


ROOT = "json"


@dataclass(frozen=True)
class Linked:
    """A text that leads to its place in the JSON below the page."""

    pointer: str
    text: str

    def __html__(self) -> Markup:
        link = Markup('<a class="n" href="#{}">{}</a>')
        return link.format(anchor(self.pointer), page_text(self.text))

    def __str__(self) -> str:
        return self.text


class Addressed:
    """A report as plain JSON, and the pointers that were taken from it."""

    def __init__(self, data: JsonObject):
        self.data = data
        self.taken: set[str] = set()

    def at(self, pointer: str) -> Any:
        """What an RFC 6901 pointer names.

        Raises:  ResultError: nothing is there.
        """
        return look_up(self.data, pointer)

    def number(self, pointer: str, style: str = "plain", unit: str = "") -> Linked:
        """The number there, in words of :func:`number_text`, with its unit."""
        text = number_text(self.at(pointer), style)
        return self.link(pointer, f"{text} {unit}" if unit else text)

    def interval(self, pointer: str, style: str = "signed") -> Linked:
        """A pair of numbers there, as "low to high"."""
        pair = self.at(pointer)
        ends = None if pair is None else [number_text(end, style) for end in pair]
        return self.link(pointer, "none" if ends is None else " to ".join(ends))

    def link(self, pointer: str, text: str) -> Linked:
        """Words of one's own for what is there."""
        self.at(pointer)
        self.taken.add(pointer)
        return Linked(pointer, text)


def anchor(pointer: str) -> str:
    """The id of a pointer's place on the page: no spaces, and nothing a browser reads otherwise."""
    return ROOT + quote(pointer, safe="/~.-_")


def step(key: str | int) -> str:
    """One part of a pointer, escaped."""
    return "/" + str(key).replace("~", "~0").replace("/", "~1")


GLOSSARY = {
    "Activation": "A number inside the model while it reads a text. Here mostly an entry of the "
    "residual stream.",
    "BOS": "The token that some models put before every text (beginning of sequence).",
    "Block": "One layer of the model: attention, then a feed-forward network (FFN). Layer 0 is "
    "the first; “at layer 3” means at the output of block 3.",
    "Control": "The same kind of edit where it should do nothing special, to tell an effect from "
    "the effect of any edit.",
    "Dimension": "One coordinate of the residual stream, counted from 0.",
    "Effective rank": "How many directions a set of vectors fills: the exponential of the entropy "
    "of the singular values. 1 means all lie on one line.",
    "Gain": "The factor by which a norm layer multiplies each dimension.",
    "Interval": "A 95 % confidence interval by bootstrap: the texts are drawn again 2,000 times, "
    "with repetition, and 95 % of the results lie in it; wider where the best of several "
    "conditions was picked. It is about texts of this kind only, and few texts make it too "
    "narrow. “none” where they are too few or all alike.",
    "Key/value cache": "What a running model keeps of earlier tokens. Dropping or rounding "
    "entries saves memory.",
    "Massive activation": "An entry of the residual stream that is larger than 100 and than a "
    "thousand times the median, on a few tokens only.",
    "Massive token": "A token that carries a massive activation, most often the first of a text.",
    "ME Layer": "The layer at whose output the massive activation first appears (massive "
    "emergence).",
    "Nats": "The unit of the loss, natural logarithm. A loss of 3 nats a token is a perplexity of "
    "about 20; +0.1 nats is 10 % more perplexity.",
    "Norm ratio": "Length of the heaviest token's vector over that of a typical token.",
    "Residual stream": "The vector that each token carries through the layers; every block adds "
    "to it.",
    "Sink": "A token that draws a large share of a head's attention without saying anything. The "
    "sink rate at eps 0.3 is the share of heads that give it more than 0.3.",
    "Super weight": "One entry of an FFN's last matrix that makes at least half of a very large "
    "output of that FFN on its own. What the model loses without it is measured, not assumed.",
    "Write share": "The part of the massive token's vector that one layer adds; negative where it "
    "takes away.",
}
