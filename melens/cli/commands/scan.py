"""scan and reach."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from melens.cli import options as opt
from melens.cli import output
from melens.cli.groups import without
from melens.cli.job import read_scan, streamed
from melens.progress import progress_on
from melens.store import remove_file

LAYERS = "scan-layers.jsonl"
"""File in --out that finished layers are kept in; removed at the end."""


def scan(
    model: opt.Model,
    *,
    reach: Annotated[
        bool | None,
        typer.Option(
            "--reach/--no-reach",
            help="Run a few first tokens to test the prediction, or run nothing (default: run "
            "them where the files are here and hold 8 GB at most).",
        ),
    ] = None,
    explain: opt.Explain = False,
    out: opt.Output,
    run: Annotated[
        opt.RunOptions, without("dtype", "batch_size", "seed", "trust_remote_code", *opt.PLACED)
    ],
) -> None:
    """Predict MODEL's ME Layer from its weights, and test it with a few first tokens.

    For every layer, the most that a single FFN neuron could write into one coordinate of the
    residual stream, norm gains included; then the neurons that stand out, the coordinates they
    share, and the layers where those are made and erased. Where something stands out, BOS, a
    chat's first token and 16 others are run up to that layer, one block in memory at a time; with
    --no-reach nothing is run. No tokenizer is needed. Reads the weights a piece at a time, so
    models that do not fit into memory can be scanned. Of a Hugging Face id only the tensors that
    are needed are fetched. Interrupted, a scan with --out goes on where it was.

    Examples:
      melens scan smollm2-135m --out runs/scan

      melens scan ./Llama-3.1-8B --no-reach --json
    """
    folder = out.out
    output.refuse_unwritable(folder)
    from melens.scanning import scan as look

    kept = None if folder is None else folder / LAYERS
    with progress_on("layers") as tick:
        result = look(
            model,
            device=None if run.device == "auto" else run.device,
            revision=run.revision,
            keep=kept,
            progress=tick,
            reach=reach,
        )
    output.save(result, folder, "scan", "scan")
    if kept is not None:
        remove_file(kept)
    output.show(result, as_json=out.as_json, folder=folder, explain=explain)


def reach(
    model: opt.Model,
    *,
    scan: Annotated[
        Path | None,
        typer.Option(help="scan.json of this model: gives the ceilings, and the layer to stop at."),
    ] = None,
    token: Annotated[
        list[int] | None, typer.Option(min=0, help="A token id to try; may be given several times.")
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(
            min=0, help="Tokens drawn from the vocabulary (default: 16, or 0 with --token)."
        ),
    ] = None,
    until: Annotated[
        int | None,
        typer.Option(
            min=0, help="Last layer to run, from 0 (default: the scan's erase layer, or all)."
        ),
    ] = None,
    out: opt.Output,
    run: Annotated[opt.RunOptions, without("batch_size", "trust_remote_code", *opt.PLACED)],
) -> None:
    """Follow first tokens through MODEL, one block in memory at a time.

    A token alone at position 0 goes as it would at the head of any text. Tried are BOS, the first
    token of a chat, and a sample of the vocabulary. Needs memory for one block, not for the model.

    Examples:
      melens reach smollm2-135m --sample 64 --out runs/reach

      melens reach ./Llama-3-8B --scan runs/scan/scan.json --token 128000
    """
    scanned, folder = read_scan(scan), out.out
    output.refuse_unwritable(folder)
    with streamed(model, run, folder, need_tokenizer=False) as loaded:
        from melens.scanning.reaching import reach as measure

        result = measure(loaded, scanned, tokens=token, sample=sample, seed=run.seed, until=until)
        output.save(result, folder, "reach", "reach")
    output.show(result, as_json=out.as_json, folder=folder)
