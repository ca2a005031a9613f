"""What commands print and write."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from melens.errors import OutputError, PromptError, ResultError
from melens.formatting import LAYOUT, printable
from melens.progress import remark

BUNDLED = "bundled"


def say(text: str) -> None:
    """A line on stdout. All that a command prints goes through here, a table or melens.progress."""
    typer.echo(printable(text, keep=LAYOUT))


def say_json(value: Any) -> None:
    """JSON on stdout, in ASCII: no terminal reads anything else into it."""
    say(json.dumps(value, indent=1))


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
    if not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write into {folder}; choose another --out.")


def save(result: Any, folder: Path | None, name: str, figure: str) -> None:
    """Write a result's JSON and its figure (PNG and SVG)."""
    if folder is None:
        return
    from melens.figures import save_figure
    from melens.store import write_atomically

    write_atomically(folder / f"{name}.json", result.to_json())
    for kind in ("png", "svg"):  # drawn anew each time: saving settles a figure's layout
        save_figure(result.plot(), folder / f"{figure}.{kind}")


def draw(result: Any, path: Path, style: str | None) -> Path:
    """One figure, or the page of a result that has one."""
    from melens.figures import save_figure

    if path.suffix.lower() not in (".html", ".htm"):
        return save_figure(result.plot(style), path)
    if not hasattr(result, "view"):
        raise ResultError(
            f"a result of '{result.kind}' has no page; end the file in .png, .svg or .pdf."
        )
    if style is not None:
        raise ResultError("a page has no style; drop --style, or end the file in .png.")
    return result.view().save_html(path)


def save_page(result: Any, folder: Path | None) -> None:
    """The circuitsvis page of a result."""
    if folder is not None:
        result.view().save_html(folder / f"{result.kind}.html")


def note(text: str) -> None:
    """A remark on stderr that ends nothing; silent with --quiet."""
    remark(f"note: {text}")


def show(result: Any, *, as_json: bool, folder: Path | None = None) -> None:
    """Print a result: JSON alone, or its tables and one plain sentence."""
    from melens.cli.tables import TABLES

    if mute := _no_evidence(result):
        note(mute)
    if as_json:
        say(result.to_json().rstrip("\n"))
        return
    TABLES[result.kind](result)
    say(result.summary())
    if folder is not None:
        remark(f"wrote {folder}")


def _no_evidence(result: Any) -> str:
    """Which texts show nothing, and what to give instead; empty where each shows something."""
    settings = result.run.settings if hasattr(result, "run") else {}
    of, said, instead = settings.get("sequences"), [], []
    if unknown := settings.get("unknown_texts"):
        said.append(f"{unknown} of {of} texts hold nothing but tokens unknown to this tokenizer")
        instead.append("in a language that it knows")
    if (repeated := settings.get("repeated_texts")) and getattr(result, "verdict", "") == "none":
        said.append(f"{repeated} of {of} texts repeat a few tokens, from which none can stand out")
        instead.append("of varied words")
    ask = f"Give texts {' and '.join(instead)}."
    return f"{'; '.join(said)}: they are no evidence. {ask}" if said else ""


def table(rows: Sequence[dict[str, Any]]) -> None:
    """A plain table; every cell is text on one line, whatever it holds."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for name in rows[0]:
        number = all(isinstance(row[name], (int, float)) for row in rows)
        made.add_column(
            Text(printable(name.replace("_", " "))), justify="right" if number else "left"
        )
    for row in rows:
        made.add_row(*(Text(cell(value)) for value in row.values()))
    show_made(made, narrowest=120)


def show_made(made: Table, *, narrowest: int) -> None:
    """Print a table of safe cells. A narrow terminal wraps lines; names are never cut."""
    console = Console(file=sys.stdout, highlight=False)
    console.width = max(console.width, narrowest)
    console.print(made)


def cell(value: Any) -> str:
    """A value as a table shows it: four digits, and a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return printable(str(value))


def show_path(path: Path, *, as_json: bool) -> None:
    """Where something is now."""
    say(json.dumps({"path": str(path)}) if as_json else str(path))


def list_models(*, as_json: bool) -> None:
    """The named models, and whether they are on this machine."""
    from melens.models import named

    rows = [
        {
            "name": name,
            "model": model.about,
            "here": named.on_this_machine(model),
            "fetch_mb": model.megabytes,
            "licence": model.licence,
        }
        for name, model in named.NAMED.items()
    ]
    if as_json:
        say_json(rows)
    else:
        table(rows)


def environment(*, as_json: bool) -> None:
    """Versions, devices and folders."""
    import platform

    import torch

    from melens.models.cache import cache_dir
    from melens.provenance import git_commit, versions

    facts = {
        **versions(),
        "git": git_commit(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cache": str(cache_dir()),
    }
    if as_json:
        say_json(facts)
        return
    for name, value in facts.items():
        say(f"{name}: {value}")
