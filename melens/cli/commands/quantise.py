"""quantise: what number formats cost a model, and what keeping a few things whole buys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from melens.cli import options as opt
from melens.cli.commands.evaluate import EvalRun, seeds_of
from melens.cli.commands.sidecar import searched
from melens.cli.job import Job

TEXTS = 28
"""Intervals of several comparisons need 20 items; a static scheme sets one text of four aside."""
ROWS = "quantise.jsonl"


def quantise(
    model: opt.Model,
    *,
    scheme: Annotated[
        list[str] | None,
        typer.Option(
            help="A number format, e.g. w8a8-tensor; repeat for several, or put commas between; all "
            "of them: all (default: one of each kind; docs/quantise.md has the list)."
        ),
    ] = None,
    super_weights: Annotated[
        Path | None,
        typer.Option(help="This model's super-weights.json (default: search two texts now)."),
    ] = None,
    first: Annotated[
        int, typer.Option(min=1, help="First tokens of the cache that are kept whole.")
    ] = 4,
    search_prefix: Annotated[
        int,
        typer.Option(min=0, max=4, help="Tokens at most of a prefix in full precision; 0 is none."),
    ] = 1,
    control_seeds: Annotated[
        str, typer.Option(help="Seeds of the random controls, at most 2, or none.")
    ] = "0",
    located: opt.Located = None,
    texts: opt.TextOptions,
    out: opt.Output,
    run: EvalRun,
) -> None:
    """Round MODEL as engines would, and measure what that costs and what protection buys.

    Weights, inputs of linear layers and keys and values are rounded in each scheme: as it is; with
    massive tokens, super weights, the ME and erase layers' down projections, first tokens or a
    prefix kept whole; and with as many random ones. Loss, KL and agreement are paired with the
    unquantised model's, over 28 texts unless told otherwise. Layers count from 0.

    With --out, the same command again goes on where an interrupted one was.

    Examples:
      melens quantise smollm2-135m --scheme w8a8-tensor --scheme kv4-token --out runs/quantise

      melens quantise ./my-model --scheme all --located runs/locate/locate.json --json
    """
    seeds = seeds_of("--control-seeds", control_seeds)
    texts = replace(texts, n_seq=texts.n_seq or (None if texts.prompt else TEXTS))
    job = Job.of(model, run, texts=texts, out=out, located=located)
    found = searched(super_weights)
    from melens.quantising import DEFAULT, SCHEMES, Protect
    from melens.quantising import quantise as measure
    from melens.settings import Run

    named = [name for given in scheme or () for name in given.split(",") if name]
    if "all" in named:
        named = [*SCHEMES, *(name for name in named if name != "all")]
    for name in named or DEFAULT:
        SCHEMES[name]  # refuses an unknown one before the model is loaded
    protect = Protect(found, first, search_prefix, seeds)
    loaded, prompts = job.load()
    from melens.inputs import prepare
    from melens.quantising.bench import refuse_early

    inputs = prepare(loaded, prompts, batch_size=run.batch_size)
    refuse_early(inputs, [SCHEMES[name] for name in named or DEFAULT], protect)
    where = job.locate(loaded, prompts)
    with job.bar("trials x batches") as tick:
        result = measure(
            inputs,
            schemes=named or DEFAULT,
            me_layer=where,
            protect=protect,
            batch_size=run.batch_size,
            run=Run(run.seed, keep=job.out and job.out / ROWS, progress=tick),
        )
    job.finish(result)
