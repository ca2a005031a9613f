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

from melens.errors import OutputError, PromptError

BUNDLED = "bundled"


def source(text: Path | None, prompt: list[str] | None) -> str | Path | Sequence[str]:
    """Texts of a command: a file, stdin, prompts, or the bundled set."""
    if text is not None and prompt:
        raise PromptError("--text and --prompt exclude each other; give one of them.")
    if text is not None:
        return "-" if str(text) == "-" else text
    return prompt or BUNDLED


def writable(folder: Path | None) -> Path | None:
    """Refuse a folder that cannot be written, before any work."""
    if folder is None:
        return None
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


def show(result: Any, *, as_json: bool, folder: Path | None = None) -> None:
    """Print a result: JSON alone, or its tables and one plain sentence."""
    if as_json:
        typer.echo(result.to_json(), nl=False)
        return
    if result.kind == "locate":
        _show_locate(result)
    elif result.rows():
        table(result.rows())
        typer.echo(result.convention)
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


def _show_locate(result: Any) -> None:
    table([_locate_row(result, row) for row in result.profile])
    if result.massive:
        typer.echo(
            "\nMassive tokens, largest entry before the final layers; the first row is the "
            "primary one, which shares, stages and the sentence below are about:"
        )
        table(
            [
                {"position": token.position, "token": repr(token.token), "dim": token.dim,
                 "value": token.value, "frequency": token.frequency}
                for token in result.massive[:8]
            ]
        )  # fmt: skip
    answers = result.criteria.model_dump().items()
    typer.echo("\nCriteria: " + ", ".join(f"{name} {cell(layer)}" for name, layer in answers))
    typer.echo(_stability(result))
    if growth := result.final_layer_growth:
        typer.echo(
            f"Final-layer growth (not emergence): layer {growth.layer}, x{growth.factor:.3g}, "
            f"dimension {growth.dim}."
        )


def _stability(result: Any) -> str:
    seen = result.stability
    alone = sum(token.massive for token in seen.first_tokens)
    return (
        f"Massive in {seen.sequences_massive} of {seen.sequences} sequences; of "
        f"{len(seen.first_tokens)} other first tokens tried alone, {alone} turn massive; "
        f"{seen.agreeing} of {seen.observations} independent observations agree."
    )


def _locate_row(result: Any, row: Any) -> dict[str, Any]:
    notes = [
        word
        for word, layer in (
            ("ME Layer", result.me_layer), ("main step", result.main_layer),
            ("peak", result.peak_layer), ("erase", result.erase_layer),
        )
        if layer == row.layer
    ]  # fmt: skip
    spread = result.cumulative
    notes += [
        f"{part} %"
        for part, layer in ((10, spread.p10), (50, spread.p50), (90, spread.p90))
        if layer == row.layer and spread.p10 != spread.p90
    ]
    notes += [f"stage at {s.layer} erased" for s in result.stages if s.erased_at == row.layer]
    return {
        "layer": row.layer, "max |x| (signed)": row.value, "position": row.position,
        "dim": row.dim, "median |x|": row.median, "token's median": row.token_median,
        "norm ratio": row.norm_ratio,
        "write share": None if row.write_share is None else round(row.write_share, 4),
        "": ", ".join(notes),
    }  # fmt: skip


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
