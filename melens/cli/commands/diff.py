"""diff, and its tables."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from melens.cli import completing, output
from melens.cli import options as opt
from melens.cli.job import Job

if TYPE_CHECKING:
    from melens.comparing.sides import Side
    from melens.inputs import Source


def diff(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="A model (see: melens models), or a saved locate.json or report.json.",
            autocompletion=completing.models_and_results,
        ),
    ],
    b: Annotated[
        str,
        typer.Argument(
            metavar="B",
            help="The one to compare with it: either kind too.",
            autocompletion=completing.models_and_results,
        ),
    ],
    *,
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
    texts: opt.TextOptions,
    out: opt.Output,
    run: opt.RunOptions,
) -> None:
    """Say whether the massive activation of B is that of A, and what changed.

    For a fine-tuned, quantised or converted model against its base. A and B are models, or saved
    results on the same texts. Exit code 0: the same within tolerance; 1: something changed.

    Examples:
      melens diff smollm2-135m smollm2-135m --dtype-b bfloat16 --out runs/diff

      melens diff runs/base/locate.json ./my-finetuned-model

      melens diff runs/base/report.json runs/quantised/report.json --json
    """
    first = Job.of(a, run, texts=texts, out=out)
    other = replace(run, dtype=dtype_b or run.dtype, revision=revision_b or run.revision)
    second = replace(first, model=b, run=other)
    from melens.comparing.differences import compare
    from melens.comparing.rows import Tolerances

    sides = _sides(first, second, any_texts=any_texts)
    result = compare(sides[0], sides[1], Tolerances(value=tolerance))
    for name, side in zip(("a", "b"), sides, strict=True):
        if side.source == "model" and first.out is not None:
            output.save(side.located, first.out / name, "locate", "profile")
    output.save(result, first.out, "diff", "diff")
    output.show(result, as_json=out.as_json, folder=first.out)
    if result.verdict == "changed":
        raise typer.Exit(1)


def _sides(first: Job, second: Job, *, any_texts: bool) -> tuple[Side, Side]:
    from melens.comparing.sides import texts_like, two_sides

    jobs, texts = (first, second), first.texts
    return two_sides(
        (first.model, second.model),
        lambda saved: texts_like(
            saved,
            first.source,
            n=texts.n_seq,
            length=texts.length,
            bos=texts.bos,
            chat=texts.chat,
        ),
        lambda index, texts, like: _measured(jobs[index], texts, like),
        any_texts=any_texts,
    )


def _measured(job: Job, texts: Source, like: Side | None) -> Side:
    from melens.comparing.sides import Side
    from melens.models import load

    model, run = load(job.model, **job.run.loading()), job.run
    with job.bar() as tick:
        return Side.of_model(
            model, texts, batch_size=run.batch_size, seed=run.seed, like=like, progress=tick
        )
