"""super-weights."""

from __future__ import annotations

from typing import Annotated

import typer

from melens.cli import options as opt


def super_weights(
    model: opt.Model,
    located: opt.Located = None,
    most: Annotated[int, typer.Option(min=1, help="Stop after this many weights that spike.")] = 10,
    known: Annotated[
        str | None,
        typer.Option(
            help="A published name to hold the coordinates against, e.g. mistralai/Mistral-7B-v0.1."
        ),
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
    """Find MODEL's super weights: single down-projection weights behind activation spikes.

    Says what each does to the massive coordinate, and what removing it costs in loss, alone and
    all together, beside as many other weights of like size. Only those whose removal costs more
    than that are called super; the rest are large weights. No weight is written to.

    Examples:
      melens super-weights smollm2-135m --bos --out runs/super-weights

      melens super-weights ./Llama-2-7b-hf --known meta-llama/Llama-2-7b-hf --most 4 --json
    """
    from melens.cli.job import Job

    job = Job.of(locals())
    if known is not None:
        from melens.isolating.super_weight_known import check_known

        check_known(known)
    loaded, texts = job.load()
    found = job.locate(loaded, texts)
    from melens.isolating.super_weight_known import with_known
    from melens.isolating.super_weight_search import Search
    from melens.isolating.super_weight_search import super_weights as measure

    search = Search(most=most, seed=seed)
    with job.bar() as tick:
        result = measure(
            loaded, texts, me_layer=found, search=search, batch_size=batch_size, progress=tick
        )
    job.finish(result if known is None else with_known(result, known))
