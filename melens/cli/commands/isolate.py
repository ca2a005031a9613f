"""isolate and super-weights."""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Annotated

import typer

from melens.cli import options as opt
from melens.cli.job import Job
from melens.progress import remark

STEPS = "isolate-steps.jsonl"
"""File in --out that finished runs are kept in; removed at the end."""


class FfnEdit(StrEnum):
    """What the FFN's half of the 2 x 2 is."""

    neurons = "neurons"
    pull_back = "pull-back"
    cap = "cap"
    drop = "drop"


def isolate(
    model: opt.Model,
    *,
    located: opt.Located = None,
    layer: Annotated[
        int | None,
        typer.Option(min=0, help="Layer to edit, from 0 (default: every step of the emergence)."),
    ] = None,
    ffn_edit: Annotated[
        FfnEdit | None,
        typer.Option(
            help="neurons: ablate the fewest that make 90 % of the write; pull-back and cap: to "
            "an ordinary token's size; drop: no FFN write. Default: neurons, of experts drop."
        ),
    ] = None,
    texts: opt.TextOptions,
    out: opt.Output,
    run: opt.SeededRun,
) -> None:
    """Find which parameters of MODEL's ME Layer make its massive activation.

    Norm and FFN edited alone and together, every block's write dropped and put in alone, the
    write split into neurons; the same at every other layer and at random, as controls. Where the
    emergence has several steps, at each of them. --out keeps what is finished: the same command
    goes on from there.

    Examples:
      melens isolate smollm2-135m --bos --n-seq 4 --length 64

      melens isolate smollm2-135m --bos --located runs/demo/locate.json --out runs/isolate

      melens isolate smollm2-135m --bos --layer 2 --ffn-edit drop --n-seq 2 --length 32
    """
    job = Job.of(model, run, texts=texts, out=out, located=located)
    loaded, prompts = job.load()
    found = job.locate(loaded, prompts)
    from melens.capture import work_counted
    from melens.isolating import isolate as measure
    from melens.settings import Run

    keep, start = None if job.out is None else job.out / STEPS, time.perf_counter()
    with job.bar("steps") as tick, work_counted(loaded) as tokens:
        how = Run(keep=keep, progress=tick)
        result = measure(
            loaded, found, prompts, layer=layer, ffn_edit=ffn_edit and ffn_edit.value, run=how
        )
        passes = tokens() / int(result.run.settings["tokens"] or 1)
    job.finish(result)
    seconds = time.perf_counter() - start
    remark(f"that took the blocks of {passes:.1f} forward passes, {seconds:.0f} s")


def super_weights(
    model: opt.Model,
    *,
    located: opt.Located = None,
    most: Annotated[int, typer.Option(min=1, help="Stop after this many weights that spike.")] = 10,
    known: Annotated[
        str | None,
        typer.Option(
            help="A published name to hold the coordinates against, e.g. mistralai/Mistral-7B-v0.1."
        ),
    ] = None,
    explain: opt.Explain = False,
    texts: opt.TextOptions,
    out: opt.Output,
    run: opt.RunOptions,
) -> None:
    """Find MODEL's super weights: single down-projection weights behind activation spikes.

    Says what each does to the massive coordinate, and what removing it costs in loss, alone and
    all together, beside as many other weights of like size. Only those whose removal costs more
    than that are called super; the rest are large weights. No weight is written to.

    Examples:
      melens super-weights smollm2-135m --bos --out runs/super-weights

      melens super-weights ./Llama-2-7b-hf --known meta-llama/Llama-2-7b-hf --most 4 --json
    """
    job = Job.of(model, run, texts=texts, out=out, located=located)
    if known is not None:
        from melens.published import check_known

        check_known(known)
    loaded, prompts = job.load()
    found = job.locate(loaded, prompts)
    from melens.isolating.super_weight_search import Search
    from melens.isolating.super_weight_search import super_weights as measure
    from melens.published import with_known

    search = Search(most=most, seed=run.seed)
    with job.bar() as tick:
        result = measure(
            loaded,
            prompts,
            me_layer=found,
            search=search,
            batch_size=run.batch_size,
            progress=tick,
        )
    job.finish(result if known is None else with_known(result, known), explain=explain)
