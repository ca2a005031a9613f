"""recipes: settings of other tools, of what a quantisation showed to help."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from melens.cli import options as opt
from melens.cli import output
from melens.cli.listing import Listing
from melens.cli.render import say, show_listings
from melens.errors import ResultError
from melens.formatting import counted
from melens.progress import remark
from melens.results.base import kind_name

if TYPE_CHECKING:
    from melens.quantising.recipe import CannotSay, Recipe
    from melens.results.quantise import Quantisation

NAME = "quantise.json"


def recipes(
    result: Annotated[
        Path, typer.Argument(help=f"A {NAME} of melens quantise, or the folder that holds one.")
    ],
    *,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder for the files and their README.md.")
    ],
    as_json: opt.Json = False,
) -> None:
    """Write what was shown to help as settings of quantisers and engines.

    For llm-compressor, compressed-tensors, llama.cpp, GPTQModel, bitsandbytes, TorchAO, vLLM and
    SGLang, each where it rounds as the measured scheme does. A protection is written only where
    it buys more than as much at random, interval and all. What a tool cannot be told is listed
    with the reason.

    Examples:
      melens recipes runs/quantise -o runs/recipes
    """
    found = _read(result)
    output.refuse_unwritable(out)
    from melens.quantising.recipe import cannot_say, nothing_said, write_recipes
    from melens.quantising.recipe import recipes as made_of

    made, refused = made_of(found), cannot_say(found)
    files = write_recipes(found, out)
    if as_json:
        say(
            json.dumps(
                {
                    "recipes": [asdict(one) for one in made],
                    "cannot": [asdict(one) for one in refused],
                },
                indent=1,
            )
        )
        return
    show_listings(_listings(made, refused, nothing_said(found)))
    remark(f"wrote {counted(len(files), 'file')} into {out}")


def _listings(made: list[Recipe], refused: list[CannotSay], none: str) -> list[Listing]:
    said = [
        {"tool": r.tool, "scheme": r.scheme, "keeps": r.protection, "file": r.file} for r in made
    ]
    shown = [Listing("Recipes, of what was shown to help:", said)] if said else []
    if not said:
        shown.append(Listing(none))
    if refused:
        rows = [
            {
                "scheme": r.scheme,
                "keeps": r.protection,
                "tools": ", ".join(r.tools),
                "why not": r.why,
            }
            for r in refused
        ]
        shown.append(Listing("\nWhat helps and cannot be said:", rows))
    return shown


def _read(path: Path) -> Quantisation:
    """A saved quantisation.

    Raises:  ResultError: the file holds something else.
    """
    from melens.results import load_result
    from melens.results.quantise import Quantisation

    file = path / NAME if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise ResultError(f"{path} holds no {NAME}; name the file, or run melens quantise first.")
    found = load_result(file)
    if not isinstance(found, Quantisation):
        raise ResultError(f"{file} holds a result of '{kind_name(found)}'; give a {NAME}.")
    return found
