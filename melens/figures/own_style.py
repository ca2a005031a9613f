"""own_style(): the reader's own matplotlib style on top of melens'."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import matplotlib as mpl

from melens.errors import ResultError
from melens.store import PAGE, read_limited

_OWN: ContextVar[str | None] = ContextVar("own_style", default=None)


@contextmanager
def own_style(style: Path | str) -> Iterator[None]:
    """Figures that are drawn and written inside the block follow this style too.

    It stands above melens' own style; colours that mean something (the ME Layer's) stay.

    Args:    style: a style file as matplotlib reads it, or the name of one of matplotlib's own.
    Raises:  ResultError: no such file or name, or a file that is not a style.
    """
    _refuse_what_is_no_style(str(style))
    token = _OWN.set(str(style))
    try:
        yield
    finally:
        _OWN.reset(token)


def apply_own_style() -> None:
    """Set matplotlib to the style in force, if there is one."""
    if (own := _OWN.get()) is not None:
        from matplotlib import style  # reads all of matplotlib's style files

        style.use(own)


def _refuse_what_is_no_style(style: str) -> None:
    from matplotlib.style import library

    if not Path(style).is_file():
        if style in library:
            return
        raise ResultError(
            f"there is no style '{style}'; give a .mplstyle file, or the name of one of "
            "matplotlib's own, such as 'ggplot'."
        )
    _refuse_other_text(Path(style))
    try:
        mpl.rc_params_from_file(style, fail_on_error=True, use_default_template=False)
    except ValueError as error:
        said = str(error).splitlines()[-1].strip()
        raise ResultError(f"{style} is not a style that matplotlib can read: {said}") from None


def _refuse_other_text(path: Path) -> None:
    """Matplotlib itself passes over lines that it does not know."""
    try:
        text = read_limited(path, PAGE).decode("utf-8")
    except (OSError, UnicodeDecodeError):
        raise ResultError(f"cannot read {path} as text; give a .mplstyle file.") from None
    for number, line in enumerate(text.splitlines(), start=1):
        said = line.split("#", 1)[0].strip()
        key = said.partition(":")[0].strip()
        if said and (":" not in said or key not in mpl.rcParams):
            raise ResultError(
                f"{path} is not a matplotlib style: line {number} is {said[:60]!r}; each line "
                "reads 'setting: value', as 'font.size: 9'."
            )
