"""generate."""

from __future__ import annotations

from typing import Annotated

import typer

from melens.cli import mask_options as mask
from melens.cli import options as opt


def generate(
    model: opt.Model,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            help="A prompt; may be given several times; - reads stdin, one a line.",
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put prompts through the chat template (default: where the tokenizer has one).",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens an answer at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 = greedy; above, both answers are drawn by --seed.")
    ] = 0.0,
    edit: mask.EditOption = None,
    mask_select: mask.MaskSelect = None,
    mask_rate: mask.MaskRate = None,
    mask_strength: mask.MaskStrength = None,
    mask_layers: mask.MaskLayers = None,
    mask_seed: mask.MaskSeed = None,
    edit_file: mask.EditFileOption = None,
    located: opt.Located = None,
    bos: opt.Bos = None,
    as_json: opt.Json = False,
    device: opt.Device = "auto",
    dtype: opt.DtypeOption = None,
    seed: opt.Seed = 0,
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    offline: opt.Offline = False,
    quiet: opt.Quiet = False,
) -> None:
    """Show MODEL's answers with and without an edit, side by side.

    The ME Layer is located first, unless --located has it, on the bundled texts, with BOS in
    front where the prompts start with it.

    Examples:
      melens generate smollm2-135m --prompt "Name three rivers."

      melens generate smollm2-135m -p "2 + 2 =" --no-chat --mask-select activation --mask-rate 0.1

      echo "Name three rivers." | melens generate smollm2-135m --prompt - --json
    """
    from melens.cli.edit_job import EditJob, prompts_of, show_answers

    texts = prompts_of(prompt)
    job = EditJob.of({**locals(), "prompt": None}, chat=chat)
    rows = job.answers(texts, max_new_tokens=max_new_tokens, temperature=temperature)
    show_answers(rows, label=job.edit.label, as_json=as_json)
