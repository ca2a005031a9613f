"""reach."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from melens.cli import options as opt


def reach(
    model: opt.Model,
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
    out: opt.Out = None,
    as_json: opt.Json = False,
    device: opt.Device = "auto",
    dtype: opt.DtypeOption = None,
    seed: opt.Seed = 0,
    revision: opt.Revision = None,
    offline: opt.Offline = False,
    quiet: opt.Quiet = False,
) -> None:
    """Follow first tokens through MODEL, one block in memory at a time.

    A token alone at position 0 goes as it would at the head of any text. Tried are BOS, the first
    token of a chat, and a sample of the vocabulary. Needs memory for one block, not for the model.

    Examples:
      melens reach smollm2-135m --sample 64 --out runs/reach

      melens reach ./Llama-3-8B --scan runs/scan/scan.json --token 128000
    """
    from melens.cli import output
    from melens.cli.streaming import Wanted, read_scan, streamed

    scanned, folder = read_scan(scan), output.writable(out)
    wanted = Wanted(model, folder, device, dtype, revision, offline=offline, need_tokenizer=False)
    with streamed(wanted) as loaded:
        from melens.scanning.reaching import reach as measure

        result = measure(loaded, scanned, tokens=token, sample=sample, seed=seed, until=until)
        output.save(result, folder, "reach", "reach")
    output.show(result, as_json=as_json, folder=folder)
