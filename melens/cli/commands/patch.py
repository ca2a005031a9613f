"""patch: which activations carry a difference between two texts."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from melens.cli import options as opt
from melens.cli.job import Job
from melens.errors import MetricError, PromptError
from melens.progress import progress_on
from melens.protocols import HookedModel, JsonObject
from melens.store import remove_file

if TYPE_CHECKING:
    from melens.batches import Prompts
    from melens.results import MELayer

CHECKPOINT = "patch.cells.json"


class PatchMetricName(StrEnum):
    """What patched runs are judged by."""

    logit_difference = "logit_difference"
    kl = "kl"
    loss = "loss"
    massive_coordinate = "massive_coordinate"
    sink_rate = "sink_rate"


class Mode(StrEnum):
    """What is put where."""

    denoising = "denoising"
    noising = "noising"
    mean = "mean"
    resample = "resample"


LOCATED = (PatchMetricName.massive_coordinate, PatchMetricName.sink_rate)


def patch(
    model: opt.Model,
    *,
    clean: Annotated[list[str], typer.Option(help="The text to explain; repeat for a batch.")],
    corrupted: Annotated[
        list[str] | None,
        typer.Option(help="Its counterpart, of as many tokens; none = ablation of the clean run."),
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(
            help="resid_pre, resid_mid, resid_post, attn_out, mlp_out, ln1, ln2, z, q, k or v; "
            "repeat for several (default: resid_pre)."
        ),
    ] = None,
    metric: Annotated[
        PatchMetricName, typer.Option(help="What every patched run measures.")
    ] = PatchMetricName.kl,
    answer: Annotated[str | None, typer.Option(help="Right token, for logit_difference.")] = None,
    wrong: Annotated[str | None, typer.Option(help="Wrong token, for logit_difference.")] = None,
    mode: Annotated[
        Mode | None,
        typer.Option(help="Default: denoising for a pair, mean (ablation) without one."),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            help="Axes: 'layer', 'layer position', 'layer head', 'layer position head' (default: "
            "layer position, and head where the site has heads)."
        ),
    ] = None,
    layer: Annotated[list[int] | None, typer.Option(help="Only these layers, from 0.")] = None,
    position: Annotated[
        list[int] | None, typer.Option(help="Only these columns of the batch, from 0.")
    ] = None,
    located: opt.Located = None,
    bos: opt.Bos = None,
    out: opt.Output,
    run: opt.SeededRun,
) -> None:
    """Patch activations of one text into another run of MODEL, and measure each patched run.

    With --out an interrupted sweep goes on where it was when the same command is given again.

    Examples:
      melens patch smollm2-135m --clean "The capital of France is" --corrupted "The capital of
      Italy is" --metric logit_difference --answer " Paris" --wrong " Rome" --out runs/patch

      melens patch smollm2-135m --clean "The capital of France is" --site mlp_out --metric
      massive_coordinate --located runs/demo/locate.json
    """
    _check(metric, answer, wrong)
    if located is not None and metric not in LOCATED:
        raise MetricError(
            f"--located is for massive_coordinate and sink_rate; {metric.value} needs none."
        )
    texts = opt.TextOptions(prompt=clean, bos=bos)
    job = Job.of(model, run, texts=texts, out=out, located=located)
    from melens.patching import Sweep
    from melens.patching import patch as measure

    choices: JsonObject = {
        "sites": site or "resid_pre",
        "mode": mode.value if mode else None,
        "by": by,
        "layers": layer,
        "positions": position,
        "seed": run.seed,
    }
    Sweep(paired=bool(corrupted), **choices)  # refuses what cannot be swept, before loading
    loaded, _ = job.load()
    chosen = _metric(metric, answer, wrong, _me_layer(job, loaded) if metric in LOCATED else None)
    kept = job.out / CHECKPOINT if job.out is not None else None

    with progress_on("patched runs") as tick:
        result = measure(
            loaded,
            _texts(clean, bos, loaded),
            _texts(corrupted, bos, loaded),
            metric=chosen,
            progress=tick,
            checkpoint=kept,
            **choices,
        )
    job.finish(result, same_texts=False)
    if kept is not None:
        remove_file(kept)


def _check(metric: PatchMetricName, answer: str | None, wrong: str | None) -> None:
    """Refuse options that do not go together, before torch loads."""
    given = [name for name, value in (("--answer", answer), ("--wrong", wrong)) if value]
    if metric is PatchMetricName.logit_difference and len(given) < 2:
        raise MetricError("logit_difference needs both --answer and --wrong, one token each.")
    if metric is not PatchMetricName.logit_difference and given:
        raise MetricError(
            f"{given[0]} is for logit_difference; drop it, or add --metric logit_difference."
        )


def _metric(
    metric: PatchMetricName, answer: str | None, wrong: str | None, located: MELayer | None
) -> object:
    from melens.patching import METRICS_OF_PATCH

    kind = METRICS_OF_PATCH[metric.value]
    if metric in LOCATED:
        return kind(located)
    return kind(answer, wrong) if metric is PatchMetricName.logit_difference else kind()


def _me_layer(job: Job, model: HookedModel) -> MELayer:
    """Located on the bundled texts, BOS as in the patched ones."""
    from melens import prompts

    return job.locate(model, prompts(bos=job.texts.bos))


def _texts(texts: list[str] | None, bos: bool | None, model: HookedModel) -> Prompts | None:
    if texts is None:
        return None
    if any(not text.strip() for text in texts):
        raise PromptError("--clean and --corrupted must hold text, not blanks.")
    from melens import prompts

    return prompts(texts, bos=bos, length=getattr(model.cfg, "n_ctx", None))
