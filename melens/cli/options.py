"""Options that several commands share: one meaning, one help text."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from melens.progress import hush


class Dtype(StrEnum):
    """Numbers the model computes in; statistics are float32 or better whatever this is."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    auto = "auto"


Model = Annotated[
    str,
    typer.Argument(
        help="A named model (see: melens models), a folder, a .gguf file or a Hugging Face id."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
Text = Annotated[
    Path | None,
    typer.Option(help="A UTF-8 file to read instead of the bundled texts; - is stdin."),
]
Lines = Annotated[
    bool, typer.Option("--lines", help="Take every line of --text as a text (blank ones left out).")
]
Prompt = Annotated[
    list[str] | None, typer.Option(help="A text of your own; may be given several times.")
]
Bos = Annotated[
    bool | None,
    typer.Option("--bos/--no-bos", help="Force BOS on or off (default: as the tokenizer does)."),
]
Chat = Annotated[bool, typer.Option("--chat", help="Put texts through the chat template.")]
NSeq = Annotated[int | None, typer.Option(min=1, help="Sequences (default: 8, or one a prompt).")]
Length = Annotated[
    int | None,
    typer.Option(
        min=4, help="Tokens a sequence at most (default: 128, or the context if shorter)."
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder for the JSON and the figures.")
]
Device = Annotated[str, typer.Option(envvar="MELENS_DEVICE", help="auto, cpu, cuda, mps, ...")]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype",
        envvar="MELENS_DTYPE",
        help="Default: float32 on the CPU, else the checkpoint's own.",
    ),
]
BatchSize = Annotated[
    int, typer.Option(min=1, envvar="MELENS_BATCH_SIZE", help="Sequences a forward pass.")
]
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="Chooses the tokens that are tried alone.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hugging Face id.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the model repository's own code.")
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Never use the network; so does MELENS_OFFLINE=1.")
]


def _hush(value: bool) -> bool:
    if value:
        hush()
    return value


Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", callback=_hush, help="No progress and no notes on stderr, only errors."
    ),
]
Located = Annotated[
    Path | None,
    typer.Option(
        help="This model's locate.json, or a check's report.json (default: locate first)."
    ),
]
