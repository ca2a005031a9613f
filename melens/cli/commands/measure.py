"""describe, collapse, metric, sinks, mixers and attention."""

from __future__ import annotations

from typing import Annotated

import typer

from melens.cli import completing, output
from melens.cli import options as opt
from melens.cli.groups import without
from melens.cli.job import Job


def describe(
    model: opt.Model,
    *,
    located: opt.Located = None,
    first_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of the vocabulary to try alone at position 0.")
    ] = 64,
    texts: opt.TextOptions,
    out: opt.Output,
    run: opt.RunOptions,
) -> None:
    """Describe MODEL's massive token: dimensions, energy, steps, rigidity, what sets it off.

    Examples:
      melens describe smollm2-135m --out runs/describe

      melens describe smollm2-135m --located runs/demo/locate.json --first-tokens 500
    """
    job = Job.of(model, run, texts=texts, out=out, located=located)
    loaded, prompts = job.load()
    found = job.locate(loaded, prompts)
    from melens.measuring import describe as measure

    with job.bar() as tick:
        result = measure(
            loaded, found, prompts, first_tokens=first_tokens, seed=run.seed, progress=tick
        )
    job.finish(result)


def collapse(
    model: opt.Model,
    *,
    located: opt.Located = None,
    texts: opt.TextOptions,
    out: opt.Output,
    run: opt.RunOptions,
) -> None:
    """Measure rank collapse in MODEL: residual, attention input, queries, keys and values.

    Every number with and without the massive token's row, centred and not.

    Examples:
      melens collapse smollm2-135m --out runs/collapse

      melens collapse smollm2-135m --located runs/demo/locate.json --json > collapse.json
    """
    job = Job.of(model, run, texts=texts, out=out, located=located)
    loaded, prompts = job.load()
    found = job.locate(loaded, prompts)
    from melens.measuring import collapse as measure

    with job.bar() as tick:
        result = measure(loaded, found, prompts, batch_size=run.batch_size, progress=tick)
    job.finish(result)


def metric(
    model: opt.Model,
    name: Annotated[
        str,
        typer.Argument(
            help="A metric, e.g. effective_rank or max_magnitude.",
            autocompletion=completing.metrics,
        ),
    ],
    texts: opt.TextOptions,
    out: opt.Output,
    run: Annotated[opt.RunOptions, without("seed")],
) -> None:
    """Measure one metric of MODEL's residual at every layer, sequence by sequence.

    Examples:
      melens metric smollm2-135m effective_rank

      melens metric smollm2-135m heaviest_norm_ratio --bos --out runs/metric
    """
    from melens.metrics import METRICS

    METRICS[name]
    job = Job.of(model, run, texts=texts, out=out)
    loaded, prompts = job.load()
    from melens.measuring import metric_by_layer

    with job.bar() as tick:
        result = metric_by_layer(loaded, name, prompts, batch_size=run.batch_size, progress=tick)
    job.finish(result)


def sinks(
    model: opt.Model,
    *,
    located: opt.Located = None,
    t: Annotated[
        int, typer.Option("--t", min=2, help="T: tokens of a sequence that count (paper: 64).")
    ] = 64,
    texts: opt.TextOptions,
    out: opt.Output,
    run: opt.RunOptions,
) -> None:
    """Measure attention sinks in MODEL, by layer, head and key position (Sink^eps of Gu et al.).

    Examples:
      melens sinks smollm2-135m --bos --t 128 --out runs/sinks

      melens sinks smollm2-135m --located runs/demo/locate.json --json
    """
    job = Job.of(model, run, texts=texts, out=out, located=located)
    loaded, prompts = job.load()
    found = job.locate(loaded, prompts)
    from melens.measuring import sinks as measure

    with job.bar() as tick:
        result = measure(loaded, found, prompts, t=t, batch_size=run.batch_size, progress=tick)
    job.finish(result)


def mixers(
    model: opt.Model,
    *,
    located: opt.Located = None,
    texts: opt.TextOptions,
    out: opt.Output,
    run: opt.RunOptions,
) -> None:
    """Follow MODEL's sink token through each kind of mixer: attention, linear, state space.

    Its size beside the median token also where nothing is massive by the absolute rule, whether it
    peaks right before full-attention layers, output gates, and its part in recurrent states.

    Examples:
      melens mixers smollm2-135m --out runs/mixers

      melens mixers ./Qwen3-Next-80B --bos --json
    """
    job = Job.of(model, run, texts=texts, out=out, located=located)
    loaded, prompts = job.load()
    found = job.locate(loaded, prompts)
    from melens.measuring import mixers as measure

    with job.bar() as tick:
        result = measure(
            loaded, found, prompts, seed=run.seed, batch_size=run.batch_size, progress=tick
        )
    job.finish(result)


def attention(
    model: opt.Model,
    *,
    located: opt.Located = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(help="A layer to show, counted from 0; may be given several times."),
    ] = None,
    head: Annotated[
        list[int] | None,
        typer.Option(help="A query head to show, from 0; may be given several times."),
    ] = None,
    texts: Annotated[opt.TextOptions, without("n_seq")],
    out: opt.Output,
    run: opt.RunOptions,
) -> None:
    """Show what chosen heads of MODEL attend to: circuitsvis views in one offline HTML file.

    The first text counts, up to 128 tokens. Default: the ME Layer and the next, as many
    heads as a page holds.

    Examples:
      melens attention smollm2-135m --prompt "My favorite color is Dark Blue." --out runs/heads

      melens attention smollm2-135m --layer 12 --layer 20 --head 0 --head 3 --out runs/heads
    """
    job = Job.of(model, run, texts=texts, out=out, located=located)
    loaded, prompts = job.load()
    from melens.measuring import attention as measure
    from melens.measuring.maps import check_choice

    check_choice(loaded, layer, head)
    result = measure(loaded, job.locate(loaded, prompts), prompts, layers=layer, heads=head)
    job.finish(result)
    output.save_page(result, job.out)
