"""melens models: what can be had by name, what is here, getting and removing it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

models_app = typer.Typer(
    help="List, get and remove the named models.", invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
Name = Annotated[str, typer.Argument(help="A named model.")]


@models_app.callback()
def models(context: typer.Context, as_json: Json = False) -> None:
    """List the named models: on this machine or not, size, licence."""
    if context.invoked_subcommand is None:
        ls(as_json=as_json)


@models_app.command()
def ls(as_json: Json = False) -> None:
    """List the named models."""
    from melens.cli import output
    from melens.models.named import NAMED, on_this_machine

    rows = [
        {
            "name": name, "model": model.about, "here": on_this_machine(model),
            "fetch_mb": model.megabytes, "licence": model.licence,
        }
        for name, model in NAMED.items()
    ]  # fmt: skip
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        output.table(rows)


@models_app.command()
def get(
    name: Name,
    accept: Annotated[
        str | None, typer.Option("--accept-license", help="The word that accepts its licence.")
    ] = None,
) -> None:
    """Fetch a named model and convert it, so that it loads in seconds."""
    from melens.models.named import NAMED, accept_licence, fetch

    model = NAMED[name]
    if accept:
        accept_licence(accept)
    typer.echo(fetch(model))


@models_app.command()
def rm(name: Name) -> None:
    """Remove a named model from melens' cache."""
    from melens.models.named import NAMED, forget

    typer.echo("removed" if forget(NAMED[name]) else "was not here")
