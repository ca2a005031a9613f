"""Figures as images that carry their own bytes: sharp at any size, alike on every machine."""

from __future__ import annotations

import base64
import io

import matplotlib as mpl

from melens.figures import draw
from melens.figures.styles import house_style
from melens.formatting import printable
from melens.results.base import Result

NAME = 48
"""Characters of a model's name that a figure has room for."""


def picture_uri(result: Result, style: str | None) -> str:
    """The figure as a ``data:`` SVG; letters are drawn as paths, so that no font is needed."""
    made = io.BytesIO()
    with house_style(), mpl.rc_context({"svg.fonttype": "path"}):
        draw(_with_plain_name(result), style).savefig(made, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(made.getvalue()).decode()


def _with_plain_name(result: Result) -> Result:
    """A copy whose model's name the figures' font can show; the page has the whole name."""
    run = getattr(result, "run", None)
    if run is None:
        return result
    name = printable(run.model).encode("ascii", "backslashreplace").decode()
    name = name if len(name) <= NAME else f"{name[: NAME - 3]}..."
    return result.model_copy(update={"run": run.model_copy(update={"model": name})})
