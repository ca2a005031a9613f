"""The figures there are, by kind of result and style; drawn and written the same way every time."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module, resources
from pathlib import Path
from typing import cast, overload

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from melens.errors import ResultError
from melens.figures.own_style import apply_own_style
from melens.formatting import brief, printable
from melens.registry import Registry
from melens.results.base import Result, kind_name
from melens.store import write_atomically

COLUMN, PAGE = 3.3, 6.9
"""Widths in inches of one column and of a page's two."""
ME_COLOUR, ERASE_COLOUR = "#D55E00", "#0072B2"
SCREEN = 110
"""Dots an inch in a notebook."""
LAYER_LABEL = "layer (counted from 0, at the block output)"
_MODULES = {
    "census": "census",
    "locate": "profile",
    "describe": "profile",
    "collapse": "ranks",
    "metric": "ranks",
    "sinks": "sinks",
    "attention": "sinks",
    "mixers": "mixers",
    "isolate": "causes",
    "super-weights": "causes",
    "patch": "patch_grid",
    "quantise": "quantised",
    "evaluate": "evaluation",
    "long-context": "long_context",
    "finetune": "training",
    "tune": "tuning",
    "check": "profile",
    "diff": "diff",
    "reach": "scan",
    "scan": "scan",
}
"""The module that draws a kind of result, imported when one is drawn."""


Drawer = Callable[..., Figure]
"""Draws results of one kind: called with the result, and where to draw it."""


class Figures(Mapping[type[Result], Registry[Drawer]]):
    """The figures of every kind of result by style, the default first; imported when asked for."""

    def __init__(self) -> None:
        self._styles: dict[type[Result], Registry[Drawer]] = {}

    def of(self, kind: type[Result]) -> Registry[Drawer]:
        """The figures of a kind of result by style; empty where it has none."""
        name = kind_name(kind)
        if name in _MODULES:
            import_module(f"melens.figures.{_MODULES[name]}")
        return self._styles.setdefault(kind, Registry(f"style of {name}"))

    def __getitem__(self, kind: type[Result]) -> Registry[Drawer]:
        if styles := self.of(kind):
            return styles
        raise KeyError(kind)

    def __iter__(self) -> Iterator[type[Result]]:
        for module in _MODULES.values():
            import_module(f"melens.figures.{module}")
        return (kind for kind, styles in self._styles.items() if styles)

    def __len__(self) -> int:
        return sum(1 for _ in self)


FIGURES = Figures()


class Drawing(Figure):
    """A figure of melens; as the last expression of a cell it shows itself.

    IPython draws matplotlib's own figures only once ``%matplotlib inline`` was said.
    """

    def _repr_png_(self) -> bytes:
        with house_style():
            return rendered(self, "png", dpi=SCREEN)


Into = Axes | Figure | SubFigure | None
"""Where a figure is drawn: axes or a figure of the user's, or a new one."""


def sheet(into: Into, width: float, height: float) -> Figure:
    """The figure that a style of several panels is drawn into; a new one in inches.

    Raises:  ResultError: axes were given, which hold one panel, or a figure that is not empty.
    """
    if isinstance(into, Axes):
        raise ResultError(
            "this style has several panels and does not fit into one ax; pass figure= (a figure "
            "or subfigure), or draw melens.figures.compare([result], ax=ax)."
        )
    if into is None:
        return Drawing(figsize=(width, height), layout="constrained")
    if into.axes:
        raise ResultError(
            f"this figure holds {len(into.axes)} axes already; give an empty one, or clear() it."
        )
    whole = root_of(into)
    if whole.get_layout_engine() is None:  # legends stand outside the panels
        whole.set_layout_engine("constrained")
    return cast("Figure", into)  # a subfigure has all that styles use of a figure


def panel(into: Into, width: float, height: float) -> tuple[Figure, Axes]:
    """The figure and the one panel that a style is drawn into."""
    if isinstance(into, Axes):
        return cast("Figure", into.figure), into
    made = sheet(into, width, height)
    return made, made.add_subplot()


def title_above(made: Figure, axes: Axes, into: Into, text: str) -> None:
    """The title of a style of one panel: the user's figure keeps its own."""
    if isinstance(into, Axes):
        axes.set_title(plain(text), loc="left")
    else:
        made.suptitle(plain(text), fontsize=8)


def legend_below(made: Figure, axes: Axes, into: Into, *, columns: int) -> None:
    """The legend of a style of one panel: below it, or within the user's axes."""
    if isinstance(into, Axes):
        axes.legend()
    else:
        shared_legend(made, axes, columns=columns)


def shared_legend(made: Figure, *panels: Axes, columns: int) -> None:
    """One legend below the figure, of what these panels name."""
    found = [axes.get_legend_handles_labels() for axes in panels]
    handles, names = ([one for part in parts for one in part] for parts in zip(*found, strict=True))
    made.legend(handles, names, loc="outside lower center", ncols=columns)


@contextmanager
def house_style() -> Iterator[None]:
    """Settings of matplotlib for every figure of melens, inside the block only.

    Those of :func:`melens.figures.own_style` come on top.
    """
    style = resources.files("melens.figures") / "melens.mplstyle"
    with resources.as_file(style) as file, mpl.rc_context(fname=file):
        apply_own_style()
        yield


def figure(kind: type[Result], style: str) -> Callable[[Drawer], Drawer]:
    """Register a function of one kind of result under a style's name."""
    return FIGURES.of(kind).register(style)


def chosen(result: Result, style: str | None) -> Drawer:
    """The function that draws a result; None = its default style.

    Raises:  ResultError: a kind without figures. UnknownNameError: a style that it lacks.
    """
    styles = FIGURES.of(type(result))
    if not styles:
        raise ResultError(f"there is no figure for a {type(result).__name__}.")
    return styles[style if style is not None else next(iter(styles))]


def layer_axis(axes: Axes, label: str = LAYER_LABEL) -> None:
    """Label the x axis as layers, with ticks at whole numbers."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def mark_me_layer(axes: Axes, layer: int | None) -> None:
    """A line at the ME Layer, with its number."""
    _mark(axes, layer, "ME Layer", ME_COLOUR, 0.04)


def mark_erase_layer(axes: Axes, layer: int | None, *, at: float) -> None:
    """A line at the layer that erases most of the massive activation; its number left of it."""
    _mark(axes, layer, "erase layer", ERASE_COLOUR, at, left=True)


def _mark(
    axes: Axes, layer: int | None, name: str, colour: str, at: float, *, left: bool = False
) -> None:
    """The text lies on white, so that no curve strikes it through."""
    if layer is None:
        return
    axes.axvline(layer, color=colour, lw=0.8, ls="--" if left else "-")
    axes.annotate(
        f"{name} {layer}",
        (layer, at),
        xytext=(-4 if left else 4, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        color=colour,
        fontsize=7,
        ha="right" if left else "left",
        bbox={"facecolor": mpl.rcParams["axes.facecolor"], "lw": 0, "pad": 0.8, "alpha": 0.85},
    )


def plain(text: str) -> str:
    """Text without mathtext and controls: a model or token may hold any character."""
    return printable(text, keep="\n").replace("$", r"\$")


LONGEST_NAME = 40
"""Characters of a model's name in a legend."""


def named(name: str, longest: int = LONGEST_NAME) -> str:
    """A model's name as a figure shows it; a longer one loses its middle."""
    if len(name) > longest:
        name = f"{name[: longest // 2]}…{name[-longest // 2 :]}"
    return plain(name)


FORMATS = ("png", "svg", "pdf")
_CANVASES = {
    "png": ("matplotlib.backends.backend_agg", "FigureCanvasAgg"),
    "svg": ("matplotlib.backends.backend_svg", "FigureCanvasSVG"),
    "pdf": ("matplotlib.backends.backend_pdf", "FigureCanvasPdf"),
}
_NO_DATE = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


@overload
def draw(
    result: Result, style: str | None = None, *, figure: Figure | SubFigure | None = None
) -> Figure: ...
@overload
def draw(
    result: Result,
    style: str | None = None,
    *,
    ax: Axes | None,
    figure: Figure | SubFigure | None = None,
) -> Figure | Axes: ...
def draw(
    result: Result,
    style: str | None = None,
    *,
    ax: Axes | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure | Axes:
    """The figure of a result; ``style`` is one of its kind's, None its default.

    A new figure is in melens' style; what is drawn into the user's keeps the user's settings.

    Args:    ax: where a style of one panel is drawn. figure: an empty figure or subfigure for any.
    Returns: the new figure; what it was drawn into: the ax, or the whole figure.
    Raises:  ResultError: a kind of result that has no figure, both ax and figure, or an ax for a
             style of several panels. UnknownNameError: no such style.
    """
    function = chosen(result, style)
    return drawn_into(lambda into: function(result, into), ax, figure)


def drawn_into(
    function: Callable[[Into], Figure], ax: Axes | None, figure: Figure | SubFigure | None
) -> Figure | Axes:
    """Draw into the user's axes or figure, or into a new one in melens' style.

    Raises:  ResultError: both were given, or something else.
    """
    if ax is not None and figure is not None:
        raise ResultError("ax and figure exclude each other; give one of them.")
    if ax is not None and not isinstance(ax, Axes):
        raise ResultError(f"ax must be matplotlib Axes, got {brief(ax, 40)}.")
    if figure is not None and not isinstance(figure, (Figure, SubFigure)):
        raise ResultError(f"figure must be a matplotlib Figure, got {brief(figure, 40)}.")
    if ax is not None:
        function(ax)
        return ax
    if figure is not None:
        return root_of(function(figure))
    with house_style():
        return function(None)


def root_of(made: Figure | SubFigure) -> Figure:
    """The figure that holds a subfigure."""
    while isinstance(made, SubFigure):
        made = made.figure
    return made


def rendered(figure: Figure, kind: str, *, dpi: float | None = None) -> bytes:
    """A figure as the bytes of a file; ``savefig`` would draw it twice for the same bytes.

    Args:    kind: one of FORMATS. dpi: dots an inch of its pixels; None = the style's.
    """
    with laid_out(figure, dpi=dpi):
        return _bytes(figure, kind)


@contextmanager
def laid_out(figure: Figure, *, dpi: float | None = None) -> Iterator[None]:
    """The layout is settled once, on pixels; inside, every format is rendered from it.

    A format alone and one of several get the same bytes so.
    """
    canvas, before, engine = figure.canvas, figure.dpi, figure.get_layout_engine()
    try:
        figure.set_dpi(mpl.rcParams["savefig.dpi"] if dpi is None else dpi)
        if engine is not None and figure.axes:
            FigureCanvasAgg(figure)
            engine.execute(figure)
            figure.set_layout_engine("none")
        yield
    finally:
        if engine is not None:
            figure.set_layout_engine(engine)
        figure.set_dpi(before)
        figure.set_canvas(canvas)


def _bytes(figure: Figure, kind: str) -> bytes:
    module, name = _CANVASES[kind]
    drawn, made = getattr(import_module(module), name)(figure), io.BytesIO()
    getattr(drawn, f"print_{kind}")(made, metadata=_NO_DATE[kind])
    return made.getvalue()


def save_figure(figure: Figure, path: Path | str, *more: Path | str) -> Path:
    """Write a figure atomically, in the format of each path; equal figures give equal bytes.

    Returns: the first path.
    Raises:  ResultError: an ending other than png, svg or pdf.
             OutputError: a folder that cannot be written.
    """
    paths = [Path(one) for one in (path, *more)]
    for one in paths:
        if _kind(one) not in FORMATS:
            ends = ", .".join(FORMATS)
            raise ResultError(f"cannot draw into {str(one)!r}; end it in .{ends}.")
    with house_style(), laid_out(figure):
        for one in paths:
            write_atomically(one, _bytes(figure, _kind(one)))
    return paths[0]


def _kind(path: Path) -> str:
    return path.suffix.removeprefix(".").lower()


def inline(result: Result) -> str:
    """The default figure as an ``<img>`` that carries its own bytes; empty where there is none."""
    if type(result) not in FIGURES:
        return ""
    with house_style():
        data = base64.b64encode(rendered(draw(result), "png", dpi=SCREEN)).decode()
    return f'<img alt="{html.escape(str(result))}" src="data:image/png;base64,{data}">'
