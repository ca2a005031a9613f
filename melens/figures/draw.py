"""The figures there are, by kind of result and style; drawn and written the same way every time."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from melens.errors import ResultError
from melens.formatting import printable
from melens.registry import Registry
from melens.results.base import Result
from melens.store import write_atomically

COLUMN, PAGE = 3.3, 6.9
"""Widths in inches of one column and of a page's two."""
ME_COLOUR = "#D55E00"
SCREEN = 110
"""Dots an inch in a notebook."""
LAYER_LABEL = "layer (counted from 0, at the block output)"
FIGURES: dict[type[Result], Registry[Callable[[Any], Figure]]] = {}


class Drawing(Figure):
    """A figure of melens; as the last expression of a cell it shows itself.

    IPython draws matplotlib's own figures only once ``%matplotlib inline`` was said.
    """

    def _repr_png_(self) -> bytes:
        made = io.BytesIO()
        with house_style():
            self.savefig(made, format="png", dpi=SCREEN, metadata={})
        return made.getvalue()


@contextmanager
def house_style() -> Iterator[None]:
    """Settings of matplotlib for every figure of melens, inside the block only."""
    style = resources.files("melens.figures") / "melens.mplstyle"
    with resources.as_file(style) as file, mpl.rc_context(fname=file):
        yield


def figure(
    kind: type[Result], style: str
) -> Callable[[Callable[[Any], Figure]], Callable[[Any], Figure]]:
    """Register a function of one kind of result under a style's name."""
    styles = FIGURES.setdefault(kind, Registry(f"style of {kind.schema_id.split('/')[1]}"))
    return styles.register(style)


def chosen(result: Result, style: str | None) -> Callable[[Any], Figure]:
    """The function that draws a result; None = its default style.

    Raises:  ResultError: a kind without figures. UnknownNameError: a style that it lacks.
    """
    if type(result) not in FIGURES:
        raise ResultError(f"there is no figure for a {type(result).__name__}.")
    styles = FIGURES[type(result)]
    return styles[style if style is not None else next(iter(styles))]


def mark_me_layer(axes: Any, layer: int | None, *, at: float = 0.04) -> None:
    """A line at the ME Layer, with its number."""
    if layer is None:
        return
    axes.axvline(layer, color=ME_COLOUR, lw=0.8)
    axes.annotate(
        f"ME Layer {layer}",
        (layer, at),
        xytext=(4, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        color=ME_COLOUR,
        fontsize=7,
    )


def plain(text: str) -> str:
    """Text without mathtext and controls: a model or token may hold any character."""
    return printable(text, keep="\n").replace("$", r"\$")


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
