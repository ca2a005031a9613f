"""What commands read, write and show, whatever they measure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from melens.cli.listing import Listing
from melens.cli.render import say, show_listings
from melens.errors import OutputError, PromptError, ResultError
from melens.progress import is_quiet, remark
from melens.protocols import JsonObject
from melens.results.base import kind_name, run_of
from melens.store import try_writing

if TYPE_CHECKING:
    from melens.results import AttentionMaps, CheckReport, Result

BUNDLED = "bundled"
DRAWS: ContextVar[bool] = ContextVar("draws", default=True)
"""Whether commands draw figures beside their JSON; `melens plot` draws the same ones later."""


def source(
    text: Path | None, prompt: list[str] | None, *, lines: bool = False
) -> str | Path | Sequence[str]:
    """Texts of a command: a file, its lines, stdin, prompts, or the bundled set."""
    if text is not None and prompt:
        raise PromptError("--text and --prompt exclude each other; give one of them.")
    if lines:
        if text is None:
            raise PromptError("--lines makes every line of --text a text; give --text FILE.")
        from melens.batches import read_lines

        return read_lines(text)
    if text is not None:
        return "-" if str(text) == "-" else text
    return prompt or BUNDLED


def refuse_unwritable(folder: Path | None) -> None:
    """Refuse a folder that cannot be written, before any work."""
    if folder is None:
        return
    if folder.is_file():
        raise typer.BadParameter(f"--out {folder} is a file; name a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror}.") from None
    try_writing(folder, "choose another --out")


def refuse_unwritable_file(option: str, path: Path) -> None:
    """Refuse a file that cannot be written, before any work; no folder is made."""
    try:
        other = path.exists() and not path.is_file()
    except OSError as error:
        raise OutputError(f"cannot write {option} {path}: {error.strerror}.") from None
    if other:
        what = "a folder" if path.is_dir() else "not a file"
        raise typer.BadParameter(f"{option} {path} is {what}; name a file to write.")
    try_writing(path.parent, f"choose another place for {option} {path}")


def save(result: Result, folder: Path | None, name: str, figure: str) -> None:
    """Write a result's JSON and its figure (PNG and SVG)."""
    if folder is None:
        return
    from melens.store import write_atomically

    write_atomically(folder / f"{name}.json", result.to_json())
    save_picture(result, folder / figure)


def save_picture(result: Result, place: Path, style: str | None = None) -> None:
    """A result's figure as PNG and SVG, unless nobody looks at figures now."""
    from melens.figures import save_figure

    if DRAWS.get():
        figure = result.plot() if style is None else result.plot(style)
        save_figure(figure, *(place.with_name(f"{place.name}.{kind}") for kind in PICTURES))


def draw(result: Result, path: Path, style: str | None) -> Path:
    """One figure, or the page of a result that has one."""
    from melens.figures import save_figure
    from melens.results import AttentionMaps

    if path.suffix.lower() not in (".html", ".htm"):
        return save_figure(result.plot(style), path)
    if not isinstance(result, AttentionMaps):
        raise ResultError(
            f"a result of '{kind_name(result)}' has no page; end the file in .png, .svg or .pdf."
        )
    if style is not None:
        raise ResultError("a page has no style; drop --style, or end the file in .png.")
    return result.view().save_html(path)


FIGURES = "figures"
"""Folder in a check's --out with a figure of every stage that has one."""
PICTURES = ("png", "svg")


def save_figures(report: CheckReport, folder: Path) -> None:
    """Each stage's figure in its default style: figures/STAGE.png and .svg."""
    for stage in drawable(report):
        save_picture(report.result(stage), folder / FIGURES / stage)


def drawable(report: CheckReport) -> list[str]:
    """Names of the results in a report that have a figure."""
    from melens.figures import FIGURES as KINDS

    return [stage for stage in report.results if type(report.result(stage)) in KINDS]


def draw_files(files: Sequence[Path], path: Path, style: str | None) -> Path:
    """One figure of a saved result, or one that compares several."""
    from melens.figures import compare, save_figure
    from melens.results import load_result

    found = [load_result(file) for file in files]
    refuse_unwritable_file("--out", path)
    if len(found) == 1:
        return draw(found[0], path, style)
    return save_figure(compare(found), path)


def in_style(style: str | None) -> AbstractContextManager[None]:
    """The reader's own style of matplotlib inside the block, if there is one."""
    if style is None:
        return nullcontext()
    from melens.figures import own_style

    return own_style(style)


def draw_all(folder: Path, into: Path, kind: str, style: str | None) -> list[Path]:
    """Every saved result in a folder as NAME.STYLE.KIND, subfolders too; other files are left out.

    Args:    style: None = every style of its kind, "default" = its kind's first; of another name,
             of those kinds that have it.
    Raises:  ResultError: no result in the folder, or none of that style.
    """
    from melens.figures import FIGURES as KINDS
    from melens.figures import save_figure
    from melens.results import load_result

    try_writing(into, "choose another --out")
    made: list[Path] = []
    for path in sorted(folder.rglob("*.json")):
        try:
            result = load_result(path)
        except ResultError as error:
            note(f"left out: {error}")
            continue
        styles = list(KINDS.of(type(result)))
        if style is not None:
            styles = styles[:1] if style == "default" else [s for s in styles if s == style]
        for name in styles:
            made.append(into / path.relative_to(folder).with_name(f"{path.stem}.{name}.{kind}"))
            save_figure(result.plot(name), made[-1])
    if not made:
        which = "" if style is None else f" with a style {style!r}"
        raise ResultError(f"{folder} holds no saved result{which} that can be drawn.")
    return made


def save_page(result: AttentionMaps, folder: Path | None) -> None:
    """The circuitsvis page of a result."""
    if folder is not None:
        result.view().save_html(folder / f"{result.kind}.html")


def note(text: str) -> None:
    """A remark on stderr that ends nothing; silent with --quiet."""
    remark(f"note: {text}")


def show(
    result: Result, *, as_json: bool, folder: Path | None = None, explain: bool = False
) -> None:
    """Print a result: JSON alone, or its tables and one plain sentence; with --quiet the latter.

    Args:    explain: print the rule that the result was decided by, too.
    """
    from melens.cli.tables import TABLES

    if mute := _no_evidence(result):
        note(mute)
    if as_json:
        say(result.to_json().rstrip("\n"))
        return
    if not is_quiet():
        show_listings(TABLES[kind_name(result)](result))
    if explain and (rule := getattr(result, "rule", None)):
        show_listings([Listing(f"Rule: {rule}.")])
    show_listings([Listing(" ".join(result.summary().split()))])
    if folder is not None:
        remark(f"wrote {folder}")


def _no_evidence(result: Result) -> str:
    """Which texts show nothing, and what to give instead; empty where each shows something."""
    run = run_of(result)
    settings: JsonObject = {} if run is None else run.settings
    of, said, instead = settings.get("sequences"), [], []
    if unknown := settings.get("unknown_texts"):
        said.append(f"{unknown} of {of} texts hold nothing but tokens unknown to this tokenizer")
        instead.append("in a language that it knows")
    if (repeated := settings.get("repeated_texts")) and getattr(result, "verdict", "") == "none":
        said.append(f"{repeated} of {of} texts repeat a few tokens, from which none can stand out")
        instead.append("of varied words")
    ask = f"Give texts {' and '.join(instead)}."
    return f"{'; '.join(said)}: they are no evidence. {ask}" if said else ""


def show_path(path: Path, *, as_json: bool) -> None:
    """Where something is now."""
    say(json.dumps({"path": str(path)}) if as_json else str(path))
