"""draw() picks the figure of a result; save_figure() writes it the same way every time."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

from matplotlib.figure import Figure

from melens.errors import ResultError
from melens.figures.styles import FIGURES, SCREEN, chosen, house_style
from melens.results.base import Result
from melens.store import write_atomically

FORMATS = ("png", "svg", "pdf")
_NO_DATE = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


def draw(result: Result, style: str | None = None) -> Figure:
    """The figure of a result, in melens' style; ``style`` is one of its kind's, None its default.

    Raises:  ResultError: a kind of result that has no figure. UnknownNameError: no such style.
    """
    function = chosen(result, style)
    with house_style():
        return function(result)


def save_figure(figure: Figure, path: Path | str) -> Path:
    """Write a figure atomically; equal figures give equal bytes.

    Raises:  ResultError: an ending other than png, svg or pdf.
             OutputError: a folder that cannot be written.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise ResultError(f"cannot draw into {str(path)!r}; end it in .{', .'.join(FORMATS)}.")
    made = io.BytesIO()
    with house_style():
        figure.savefig(made, format=kind, metadata=_NO_DATE[kind])
    write_atomically(path, made.getvalue())
    return path


def inline(result: Result) -> str:
    """The default figure as an ``<img>`` that carries its own bytes; empty where there is none."""
    if type(result) not in FIGURES:
        return ""
    made = io.BytesIO()
    with house_style():
        draw(result).savefig(made, format="png", dpi=SCREEN, metadata=_NO_DATE["png"])
    data = base64.b64encode(made.getvalue()).decode()
    return f'<img alt="{html.escape(str(result))}" src="data:image/png;base64,{data}">'
