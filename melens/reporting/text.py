"""Text that came from a model, a tokenizer or a user, made safe for a page or for markdown."""

from __future__ import annotations

import re
from typing import Any

from markupsafe import Markup, escape

from melens.figures.attention_view import marked, shown

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


def number_text(value: Any, style: str = "plain") -> str:
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
