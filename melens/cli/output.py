"""What commands print and write."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from melens.errors import OutputError, PromptError, ResultError

BUNDLED = "bundled"


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


def writable(folder: Path | None) -> Path | None:
    """Refuse a folder that cannot be written, before any work."""
    if folder is None:
        return None
    if folder.is_file():
        raise typer.BadParameter(f"--out {folder} is a file; name a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror}.") from None
    if not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write into {folder}; choose another --out.")
    return folder


@contextmanager
def bar(unit: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr; none off a terminal."""
    from tqdm.auto import tqdm

    with tqdm(unit=f" {unit}", disable=True if quiet else None, file=sys.stderr) as shown:

        def tick(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield tick


def save(result: Any, folder: Path | None, name: str, figure: str) -> None:
    """Write a result's JSON and its figure (PNG and SVG)."""
    if folder is None:
        return
    from melens.figures import save_figure
    from melens.results.base import write_atomically

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
    """A remark on stderr that ends nothing."""
    sys.stderr.write(f"melens: note: {text}\n")


def show(result: Any, *, as_json: bool, folder: Path | None = None) -> None:
    """Print a result: JSON alone, or its tables and one plain sentence."""
    from melens.cli.all_tables import TABLES

    run = getattr(result, "run", None)
    if unknown := run and run.settings.get("unknown_texts"):
        of = run.settings.get("sequences")
        note(
            f"{unknown} of {of} texts hold nothing but tokens unknown to this tokenizer; they are "
            "no evidence. Give texts in a language that it knows."
        )
    if as_json:
        typer.echo(result.to_json(), nl=False)
        return
    TABLES[result.kind](result)
    typer.echo(result.summary())
    if folder is not None:
        sys.stderr.write(f"melens: wrote {folder}\n")


def table(rows: Sequence[dict[str, Any]]) -> None:
    """A plain table; every cell is text, whatever it holds."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for name in rows[0]:
        number = all(isinstance(row[name], (int, float)) for row in rows)
        made.add_column(name.replace("_", " "), justify="right" if number else "left")
    for row in rows:
        made.add_row(*(Text(cell(value)) for value in row.values()))
    console = Console(file=sys.stdout, highlight=False)
    # A narrow terminal wraps lines; names are never cut.
    console.width = max(console.width, 120)
    console.print(made)


def cell(value: Any) -> str:
    """A value as a table shows it: four digits, and a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def show_path(path: Path, *, as_json: bool) -> None:
    """Where something is now."""
    typer.echo(json.dumps({"path": str(path)}) if as_json else path)


def list_models(*, as_json: bool) -> None:
    """The named models, and whether they are on this machine."""
    from melens.models import named

    rows = [
        {"name": name, "model": model.about, "here": named.on_this_machine(model),
         "fetch_mb": model.megabytes, "licence": model.licence}
        for name, model in named.NAMED.items()
    ]  # fmt: skip
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        table(rows)


def environment(*, as_json: bool) -> None:
    """Versions, devices and folders."""
    import platform

    import torch

    from melens.models.cache import cache_dir
    from melens.provenance import git_commit, versions

    facts = {
        **versions(), "git": git_commit(), "platform": platform.platform(),
        "threads": torch.get_num_threads(), "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(), "cache": str(cache_dir()),
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        typer.echo(f"{name}: {value}")
