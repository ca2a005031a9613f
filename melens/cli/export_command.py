"""export."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from melens.cli import mask_options as mask
from melens.cli import options as opt


class ExportFormat(StrEnum):
    """What is written, as in ``melens.results.export.Format``."""

    hf = "hf"
    prefix = "prefix"
    peft = "peft"


def export(
    model: opt.Model,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="A new or empty folder, or an earlier export to replace."),
    ],
    format: Annotated[
        ExportFormat,
        typer.Option(
            help="hf: a model folder with melens.json; prefix: keys and values of the fixed first "
            "token; peft: the same as a prefix-tuning adapter."
        ),
    ] = ExportFormat.hf,
    edit: mask.EditOption = None,
    mask_select: mask.MaskSelect = None,
    mask_rate: mask.MaskRate = None,
    mask_strength: mask.MaskStrength = None,
    mask_layers: mask.MaskLayers = None,
    mask_seed: mask.MaskSeed = None,
    edit_file: mask.EditFileOption = None,
    located: opt.Located = None,
    first_token: Annotated[
        str | None,
        typer.Option(
            help="For prefix and peft, a text of one token (default: BOS where the tokenizer puts "
            "it first, or what the chat template starts with)."
        ),
    ] = None,
    bos: opt.Bos = None,
    n_seq: opt.NSeq = None,
    length: opt.Length = None,
    as_json: opt.Json = False,
    device: opt.Device = "auto",
    dtype: opt.DtypeOption = None,
    seed: opt.Seed = 0,
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    offline: opt.Offline = False,
    quiet: opt.Quiet = False,
) -> None:
    """Save MODEL's edit to be used elsewhere: as a model folder, a prefix, or a PEFT adapter.

    With a fixed first token the mask is a constant edit of that token's keys and values: prefix
    and peft hold them, need no melens, and cost nothing while decoding. Leave the first token out
    of a peft adapter's input. The ME Layer is located first, unless --located has it; for prefix
    and peft on texts that start with the first token, where that is BOS.

    A folder of --format hf has its edit in melens.json: only melens applies it. Loaded by
    transformers or anything else it is the model without the edit; its README.md says how to load.

    Examples:
      melens export smollm2-135m --format hf -o runs/masked

      melens export smollm2-135m --format peft --mask-rate 0.5 -o runs/adapter

      melens export smollm2-135m --format prefix --located runs/demo/locate.json -o runs/prefix
    """
    from melens.cli.edit_job import EditJob, show_export

    job = EditJob.of(locals(), first_token=first_token)
    made = job.export(format.value, out)
    show_export(made, as_json=as_json)
