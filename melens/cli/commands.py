"""locate, known, plot, models and env."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(help="A named model (see: melens models), a folder, a .gguf file or a "
                        "Hugging Face id.")
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]


class Dtype(StrEnum):
    """Numbers the model computes in; statistics are float32 or better whatever this is."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    auto = "auto"


def locate(
    model: Model,
    text: Annotated[
        Path | None,
        typer.Option(help="A UTF-8 file to read instead of the bundled texts; - is stdin."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A text of your own; may be given several times.")
    ] = None,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos", help="Force BOS on or off (default: as the tokenizer does)."
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put texts through the chat template.")
    ] = False,
    n_seq: Annotated[
        int | None, typer.Option(min=1, help="Sequences (default: 8, or one a prompt).")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=4, help="Tokens a sequence at most (default: 128, or the context if shorter)."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for locate.json, profile.png and profile.svg."),
    ] = None,
    as_json: Json = False,
    device: Annotated[
        str, typer.Option(envvar="MELENS_DEVICE", help="auto, cpu, cuda, mps, ...")
    ] = "auto",
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            envvar="MELENS_DTYPE", help="Default: float32 on the CPU, else the checkpoint's own."
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, envvar="MELENS_BATCH_SIZE", help="Sequences a forward pass.")
    ] = 4,
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**63 - 1, help="Chooses the first tokens that are tried alone."),
    ] = 0,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hugging Face id.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model repository's own code.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Find the layer of MODEL where massive activations emerge.

    Examples:
      melens locate smollm2-135m --out runs/demo

      melens locate ./my-model --text corpus.txt --n-seq 16 --json > located.json

      echo "My favorite color is Dark Blue." | melens locate smollm2-135m --text - --bos
    """
    from melens.cli import output

    source = output.source(text, prompt)
    if offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["MELENS_OFFLINE"] = "1"
    folder = output.writable(out)
    from melens import load, prompts
    from melens.emergence import locate as find

    texts = prompts(source, n=n_seq, length=length, bos=bos, chat=chat)
    loaded = load(
        model, device=None if device == "auto" else device, dtype=dtype.value if dtype else None,
        revision=revision, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    with output.bar("sequences", quiet=quiet) as tick:
        result = find(loaded, texts, batch_size=batch_size, seed=seed, progress=tick)
    output.save(result, folder, "locate", "profile")
    output.show(result, as_json=as_json, folder=folder)


def known(
    model: Annotated[str, typer.Argument(help="A published name, e.g. Qwen/Qwen3-4B.")],
    result: Annotated[Path, typer.Argument(help="locate.json of a run.")],
    as_json: Json = False,
) -> None:
    """Hold a located ME Layer against the published numbers of MODEL.

    Says match, mismatch or unknown, number by number, with the index convention spelled out.

    Example:  melens known smollm2-135m runs/demo/locate.json
    """
    from melens.cli import output
    from melens.knowledge import known as hold
    from melens.results import load_result

    output.show(hold(model, load_result(result)), as_json=as_json)


def plot(
    result: Annotated[Path, typer.Argument(help="Any saved result.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: .png, .svg or .pdf.")],
) -> None:
    """Draw a saved RESULT again, without the model.

    Example:  melens plot runs/demo/locate.json -o profile.pdf
    """
    from melens.figures import save_figure
    from melens.results import load_result

    typer.echo(save_figure(load_result(result).plot(), out))


class Action(StrEnum):
    """What to do with the named models."""

    ls = "ls"
    get = "get"
    rm = "rm"


def models(
    action: Annotated[
        Action, typer.Argument(help="List, fetch and convert, or remove.")
    ] = Action.ls,
    name: Annotated[str | None, typer.Argument(help="A named model, for get and rm.")] = None,
    accept: Annotated[
        str | None, typer.Option("--accept-license", help="The word that accepts its licence.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the named models: here or not, size, licence. Fetch one with get, remove it with rm.

    Examples:
      melens models

      melens models get gemma3-270m --accept-license gemma
    """
    from melens.cli import output
    from melens.models import named

    if accept and action is not Action.get:
        raise typer.BadParameter("--accept-license goes with: melens models get NAME")
    if action is Action.ls:
        if name is not None:
            raise typer.BadParameter(f"ls takes no name; did you mean: melens models get {name}")
        output.list_models(as_json=as_json)
        return
    if name is None:
        raise typer.BadParameter(f"{action.value} needs the NAME of a model")
    model = named.NAMED[name]
    if action is Action.rm:
        typer.echo("removed" if named.forget(model) else "was not here")
        return
    if accept and accept != model.accept:
        raise typer.BadParameter(f"{name} does not ask for the licence '{accept}'")
    if accept:
        named.accept_licence(accept)
    output.show_path(named.fetch(model), as_json=as_json)


def env(as_json: Json = False) -> None:
    """Print versions, devices and folders, for a bug report."""
    from melens.cli import output

    output.environment(as_json=as_json)
