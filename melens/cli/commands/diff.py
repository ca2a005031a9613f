"""diff, and its tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from melens.cli import options as opt


def diff(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A", help="A model (see: melens models), or a saved locate.json or report.json."
        ),
    ],
    b: Annotated[
        str, typer.Argument(metavar="B", help="The one to hold against it: either kind too.")
    ],
    tolerance: Annotated[
        float,
        typer.Option(
            min=0.001,
            max=0.999,
            help="Relative change of the massive value that still counts as the same.",
        ),
    ] = 0.1,
    any_texts: Annotated[
        bool, typer.Option("--any-texts", help="Compare saved results of other texts too.")
    ] = False,
    dtype_b: Annotated[
        opt.Dtype | None, typer.Option("--dtype-b", help="Another dtype for B (default: --dtype).")
    ] = None,
    revision_b: Annotated[
        str | None,
        typer.Option("--revision-b", help="Another revision for B (default: --revision)."),
    ] = None,
    text: opt.Text = None,
    lines: opt.Lines = False,
    prompt: opt.Prompt = None,
    bos: opt.Bos = None,
    chat: opt.Chat = False,
    n_seq: opt.NSeq = None,
    length: opt.Length = None,
    out: opt.Out = None,
    as_json: opt.Json = False,
    device: opt.Device = "auto",
    dtype: opt.DtypeOption = None,
    batch_size: opt.BatchSize = 4,
    seed: opt.Seed = 0,
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    offline: opt.Offline = False,
    quiet: opt.Quiet = False,
) -> None:
    """Say whether the massive activation of B is that of A, and what changed.

    For a fine-tuned, quantised or converted model against its base. A and B are models, or saved
    results on the same texts. Exit code 0: the same within tolerance; 1: something changed.

    Examples:
      melens diff smollm2-135m smollm2-135m --dtype-b bfloat16 --out runs/diff

      melens diff runs/base/locate.json ./my-finetuned-model

      melens diff runs/base/report.json runs/quantised/report.json --json
    """
    from melens.cli import output
    from melens.cli.job import Job

    first = Job.of({**locals(), "model": a})
    second = replace(first, model=b, dtype=dtype_b or dtype, revision=revision_b or revision)
    from melens.comparing.differences import compare
    from melens.comparing.rows import Tolerances

    sides = _sides(first, second, any_texts=any_texts)
    result = compare(sides[0], sides[1], Tolerances(value=tolerance))
    for name, side in zip(("a", "b"), sides, strict=True):
        if side.source == "model" and out is not None:
            output.save(side.located, out / name, "locate", "profile")
    output.save(result, out, "diff", "diff")
    output.show(result, as_json=as_json, folder=out)
    if result.verdict == "changed":
        raise typer.Exit(1)


def _sides(first: Any, second: Any, *, any_texts: bool) -> Any:
    from melens.comparing.sides import texts_like, two_sides

    jobs = first, second
    return two_sides(
        (first.model, second.model),
        lambda saved: texts_like(
            saved, first.source, n=first.n_seq, length=first.length, bos=first.bos, chat=first.chat
        ),
        lambda index, texts, like: _measured(jobs[index], texts, like),
        any_texts=any_texts,
    )


def _measured(job: Any, texts: Any, like: Any) -> Any:
    from melens.comparing.sides import Side
    from melens.models import load

    model = load(
        job.model,
        device=None if job.device == "auto" else job.device,
        dtype=job.dtype.value if job.dtype else None,
        revision=job.revision,
        trust_remote_code=job.trust_remote_code,
    )
    with job.bar() as tick:
        return Side.of_model(
            model, texts, batch_size=job.batch_size, seed=job.seed, like=like, progress=tick
        )
