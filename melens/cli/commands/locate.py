"""locate, known, plot, models and env."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from melens.cli import completing, output
from melens.cli import options as opt
from melens.cli.job import Job, locate_streamed
from melens.cli.listing import Listing
from melens.cli.render import say, say_json, show_listings
from melens.protocols import JsonObject
from melens.results.base import run_of


def locate(
    model: opt.Model,
    texts: opt.TextOptions,
    out: opt.Output,
    run: opt.RunOptions,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="For a model that does not fit: read its blocks from disk, one in memory at a "
            "time. All sequences are one batch; default 2 of 64 tokens.",
        ),
    ] = False,
) -> None:
    """Find the layer of MODEL where massive activations emerge.

    Examples:
      melens locate smollm2-135m --out runs/demo

      melens locate ./my-model --text corpus.txt --n-seq 16 --json > located.json

      echo "My favorite color is Dark Blue." | melens locate smollm2-135m --text - --bos

      melens locate ./Llama-3-8B --stream --out runs/large
    """
    job = Job.of(model, run, texts=texts, out=out)
    result = locate_streamed(job) if stream else job.locate(*job.load(), overwrite=True)
    output.show(result, as_json=out.as_json, folder=job.out)


def known(
    model: Annotated[
        str,
        typer.Argument(help="A published name, e.g. Qwen/Qwen3-4B, or a .gguf file that says it."),
    ],
    result: Annotated[
        Path,
        typer.Argument(help="locate, scan, super-weights, sinks or report.json of a run."),
    ],
    as_json: opt.Json = False,
) -> None:
    """Hold a result against the published numbers of MODEL.

    Says match, mismatch or unknown, number by number, by how much what does not fit is off, and
    whose number it is, with the index convention spelled out. Of a check's report every stage
    that something is published about is compared.

    Examples:
      melens known smollm2-135m runs/demo/locate.json

      melens known Qwen/Qwen3-8B runs/scan/scan.json --json
    """
    from melens import published
    from melens.results import load_result

    found = load_result(result)
    names: tuple[str, ...] = (model,)
    if model.lower().endswith(".gguf"):
        from melens.models.gguf import given_names

        names = (Path(model).name, *given_names(Path(model).expanduser()))
    made = published.known_by(names, lambda name: published.known(name, found))
    run = run_of(found)
    if run is not None and not published.same_name(run.model, *names):
        output.note(f"{result} is a result of {run.model}; it is held against {made.model}.")
    output.show(made, as_json=as_json)


class FileKind(StrEnum):
    """What a figure is written as."""

    pdf = "pdf"
    png = "png"
    svg = "svg"


def plot(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULT...",
            help="A saved result; several of one kind for a figure that compares them; with --all "
            "a folder of results.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="File to write: .png, .svg or .pdf; .html for attention. With --all a folder "
            "(default: beside the results).",
        ),
    ] = None,
    style: Annotated[
        str | None,
        typer.Option(
            help="Which figure (default: the first; with --all every one, or default for the first)."
        ),
    ] = None,
    every: Annotated[
        bool,
        typer.Option("--all", help="Draw all results of a folder: RESULT.STYLE.FORMAT for each."),
    ] = False,
    format: Annotated[
        FileKind | None, typer.Option(help="Of the files of --all (default: png).")
    ] = None,
    mplstyle: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Matplotlib's settings on top of melens': a .mplstyle file, or the name of one of "
            "matplotlib's own styles.",
        ),
    ] = None,
) -> None:
    """Draw a saved RESULT again, without the model.

    Styles: locate: profile. describe: curves, dimensions. collapse: rank, participation, stable,
    entropy, top1. metric: layers. sinks: map, curves. mixers: layers. attention: panels, or a page where the file ends in .html. isolate:
    factorial, layers, path, neurons, gains. super-weights: spikes. patch: change, normalised. quantise: quantise. evaluate: dose, paired.
    long-context: found, answer-loss, positions. tune: race. finetune: training, layers. check: profile. diff: profiles. reach: reach. scan: ceilings. census: depth.

    Several results of locate, describe, collapse, sinks, scan, metric or evaluate give one figure: one
    line or point a result.

    Examples:
      melens plot runs/demo/locate.json -o profile.pdf

      melens plot runs/demo/locate.json -o profile.pdf --mplstyle thesis.mplstyle

      melens plot runs/demo/locate.json runs/bos/locate.json -o both.pdf

      melens plot runs/demo --all --format pdf --out figures
    """
    if format is not None and not every:
        raise typer.BadParameter("--format goes with --all; the ending of --out says it otherwise.")
    if every and (len(results) > 1 or not results[0].is_dir()):
        named = " ".join(map(str, results))
        raise typer.BadParameter(f"--all draws one folder of results, got {named}.")
    if not every and out is None:
        raise typer.BadParameter("name the file with --out, or draw a folder with --all.")
    if len(results) > 1 and style is not None:
        raise typer.BadParameter("--style is of one result; several give one figure that compares.")
    with output.in_style(mplstyle):
        if every:
            output.refuse_unwritable(out)
            kind = (format or FileKind.png).value
            made = output.draw_all(results[0], out or results[0], kind, style)
        else:
            assert out is not None
            made = [output.draw_files(results, out, style)]
    for path in made:
        output.show_path(path, as_json=False)


class Action(StrEnum):
    """What to do with the named models, or which table to show."""

    ls = "ls"
    get = "get"
    rm = "rm"
    families = "families"


def models(
    action: Annotated[
        Action,
        typer.Argument(help="List, fetch and convert, remove; or which architectures work."),
    ] = Action.ls,
    name: Annotated[
        str | None,
        typer.Argument(
            help="A named model, for get and rm; an architecture, for families.",
            autocompletion=completing.named_models,
        ),
    ] = None,
    accept: Annotated[
        str | None, typer.Option("--accept-license", help="The word that accepts its licence.")
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """List the named models: here or not, size, licence. Fetch one with get, remove it with rm.

    families lists what works with which architecture of transformers; with a NAME, why what does
    not.

    Examples:
      melens models

      melens models families GptOssForCausalLM

      melens models get gemma3-270m --accept-license gemma
    """
    from melens.models import named

    if accept and action is not Action.get:
        raise typer.BadParameter("--accept-license goes with: melens models get NAME")
    if action is Action.families:
        _list_families(name, as_json=as_json)
        return
    if action is Action.ls:
        if name is not None:
            raise typer.BadParameter(f"ls takes no name; did you mean: melens models get {name}")
        _list(as_json=as_json)
        return
    if name is None:
        raise typer.BadParameter(f"{action.value} needs the NAME of a model")
    model = named.NAMED[name]
    if action is Action.rm:
        say("removed" if named.forget(model) else "was not here")
        return
    if accept and accept != model.accept:
        raise typer.BadParameter(f"{name} does not ask for the licence '{accept}'")
    if accept:
        named.accept_licence(accept)
    output.show_path(named.fetch(model), as_json=as_json)


def env(as_json: opt.Json = False) -> None:
    """Print versions, devices and folders, for a bug report."""
    facts = _machine()
    if as_json:
        say_json(facts)
        return
    for name, value in facts.items():
        say(f"{name}: {value}")


def _list(*, as_json: bool) -> None:
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
        show_listings([Listing("", rows)])


def _list_families(name: str | None, *, as_json: bool) -> None:
    """All architectures, or one with the reasons of what it cannot."""
    from melens.models.families import NOTHING, YES, families, family_name

    if name is not None:
        known = family_name(name)
        found = families()[known]
        rows = [{"measure": measure, "works": said} for measure, said in found.items()]
        caption = f"{known}; bridge: lens = TransformerLens' own, measured = made by measurement"
        say_json(found) if as_json else show_listings([Listing(caption, rows)])
        return
    if as_json:
        say_json(families())
        return
    marks = {YES: YES, NOTHING: NOTHING, "": ""}
    rows = [
        {"architecture": a, "bridge": row["bridge"]}
        | {m: marks.get(said, "no") for m, said in row.items() if m != "bridge"}
        for a, row in families().items()
    ]
    caption = "yes: it gives what was planted; -: nothing to measure; no: refused, with its reason"
    show_listings([Listing(caption, rows)])


def _machine() -> JsonObject:
    """Versions, devices and folders."""
    import platform

    import torch

    from melens.models.cache import cache_dir
    from melens.provenance import git_commit, versions

    return {
        **versions(),
        "git": git_commit(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cache": str(cache_dir()),
    }
