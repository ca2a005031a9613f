"""picture_uri(): a result's figure as a small drawing inside the page."""

from __future__ import annotations

import re
from urllib.parse import quote

import matplotlib as mpl

from melens.figures import draw
from melens.figures.draw import house_style, rendered
from melens.formatting import printable
from melens.results.base import Result, run_of

NAME = 48
"""Characters of a model's name that a figure has room for."""
DIGITS = 2
"""Decimals of a place in a drawing, in points: a tenth of what a screen shows."""
PLAIN = ' "()*,-./:;=?@_!$+{}[]|~^`\\<>'
"""Characters that may stand as they are between single quotes of an attribute."""
_SPARE = re.compile(r"<!--.*?-->|<metadata>.*?</metadata>|<\?xml.*?\?>|<!DOCTYPE.*?>", re.DOTALL)
_PLACES = re.compile(r'( (?:d|x|y|width|height)=")([^"]*)|(translate\()([^)]*)')
_NUMBER = re.compile(r"-?\d+\.\d+")
_STEP = re.compile(r"\s*([MLQCzZ])\s*")


def picture_uri(result: Result, style: str | None) -> str:
    """The figure as a ``data:`` SVG; letters are drawn as paths, so that no font is needed.

    It goes between single quotes.
    """
    with house_style(), mpl.rc_context({"svg.fonttype": "path"}):
        made = rendered(draw(_with_plain_name(result), style), "svg")
    return "data:image/svg+xml," + quote(smaller(made.decode()), safe=PLAIN)


def smaller(svg: str) -> str:
    """The same drawing in fewer characters: no comments, no spare names, places rounded."""
    svg = re.sub(r">\s+<", "><", _SPARE.sub("", svg)).strip()
    named = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg))
    used = {name for pair in named for name in pair}
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = _PLACES.sub(
        lambda found: (found[1] or found[3]) + _rounded(found[2] or found[4] or ""), svg
    )
    return re.sub(r"\s*\n\s*", " ", svg)


def _rounded(places: str) -> str:
    """Numbers with few decimals, and no space that a path does not need."""
    short = _NUMBER.sub(lambda n: f"{float(n[0]):.{DIGITS}f}".rstrip("0").rstrip("."), places)
    return _STEP.sub(r"\1", short).strip()


def _with_plain_name(result: Result) -> Result:
    """A copy whose model's name the figures' font can show; the page has the whole name."""
    run = run_of(result)
    if run is None:
        return result
    name = printable(run.model).encode("ascii", "backslashreplace").decode()
    name = name if len(name) <= NAME else f"{name[: NAME - 3]}..."
    return result.model_copy(update={"run": run.model_copy(update={"model": name})})
