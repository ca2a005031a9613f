"""tune."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from melens.cli import options as opt
from melens.cli.mask_options import layers_from
from melens.errors import InterventionError
from melens.formatting import brief

ROWS = "tune.items.jsonl"
EDIT = "edit.json"
LOSS = "perplexity"


def tune(
    model: opt.Model,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A text file, or the task's own file or folder (default: the bundled texts)."
        ),
    ] = None,
    task: Annotated[
        str, typer.Option(help="perplexity (the loss of texts), or another teacher-forced task.")
    ] = LOSS,
    budget: Annotated[
        int | None,
        typer.Option(min=1, help="Settings x items to run, confirmation included (default: 2000)."),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=1, help="Time to spend, instead of --budget.")
    ] = None,
    selects: Annotated[
        str | None,
        typer.Option(help="Rules to try, with commas (default: gamma,activation,product,bottom)."),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="after, next, or layers from 0 such as 12-29; with commas (default: after,next)."
        ),
    ] = None,
    rates: Annotated[
        str | None, typer.Option(help="Rates to try, with commas (default: 0.1,0.25,0.5,0.75,0.9).")
    ] = None,
    strengths: Annotated[
        str | None, typer.Option(help="Strengths to try, with commas (default: 0.25,0.5,1).")
    ] = None,
    confirm: Annotated[
        int, typer.Option(min=1, help="Best settings that are held to the held-out items.")
    ] = 3,
    located: opt.Located = None,
    bos: opt.Bos = None,
    n: Annotated[
        int | None, typer.Option("--n", "-n", min=1, help="Items, both halves (default: 64).")
    ] = None,
    length: opt.Length = None,
    out: opt.Out = None,
    as_json: opt.Json = False,
    device: opt.Device = "auto",
    dtype: opt.DtypeOption = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of the split and of what is drawn.")
    ] = 0,
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    offline: opt.Offline = False,
    quiet: opt.Quiet = False,
) -> None:
    """Search for a mask that betters MODEL, and confirm it on items that were not searched on.

    Random dimensions race as controls. That no setting betters the model is a result like any
    other. With --out an interrupted search goes on where it was when the same command is given
    again, and edit.json holds the best setting, if there is one.

    Examples:
      melens tune smollm2-135m --budget 1500 --out runs/tune

      melens tune smollm2-135m --task gsm8k-likelihood --data gsm8k --selects gamma,activation
      --layers after --seconds 600 --out runs/tune-gsm8k
    """
    if budget is not None and seconds is not None:
        raise InterventionError("--budget and --seconds exclude each other; give one of them.")
    asked = {
        "selects": _list("--selects", selects, str), "layers": _list("--layers", layers, layers_from),
        "rates": _list("--rates", rates, float), "strengths": _list("--strengths", strengths, float),
    }  # fmt: skip
    from melens.cli.job import Job

    job = Job.of({**locals(), "prompt": None, "text": None, "chat": False, "n_seq": None,
                  "length": None, "batch_size": 4})  # fmt: skip
    from melens.tuning import Budget, Settings, Space
    from melens.tuning import tune as search
    from melens.tuning.items import alike_items, check_enough

    space = Space(**{name: values for name, values in asked.items() if values})
    spent = Budget(seconds=seconds) if seconds is not None else budget
    kept = None if job.out is None else job.out / ROWS
    metric, texts = _what(task, data, n=n, length=length, bos=bos)
    check_enough(texts, metric, Settings.held_out)
    loaded, _ = job.load()
    found = job.locate(loaded, alike_items(loaded.tokenizer, texts, metric))
    with job.bar("evaluations") as tick:
        result = search(
            loaded, texts, metric, spent, me_layer=found, space=space, progress=tick,
            settings=Settings(confirm=confirm, seed=seed, items=kept),
        )  # fmt: skip
    job.finish(result, same_texts=False)
    if job.out is not None:
        _save_edit(job.out / EDIT, result.best)


def _list(option: str, text: str | None, read: Callable[[str], Any]) -> tuple[Any, ...]:
    """Values between commas; none where the option was not given."""
    try:
        return () if text is None else tuple(read(part.strip()) for part in text.split(","))
    except ValueError:
        raise InterventionError(f"{option} takes numbers with commas, got {brief(text)}.") from None


def _what(task: str, data: Path | None, **cut: Any) -> tuple[str, Any]:
    """Metric and texts; refuses an unknown task and unreadable texts before the model loads."""
    from melens.batches import prompts
    from melens.evaluating import Source
    from melens.tuning.items import ITEMS, objective_of

    if task == LOSS:
        cut["n"] = cut["n"] or ITEMS
        return "loss", prompts("bundled" if data is None else data, **cut)
    objective_of(task)
    given = {name: value for name, value in cut.items() if value is not None}
    return task, Source(data=data, **given)


def _save_edit(path: Path, best: Any) -> None:
    """The best setting; an earlier run's does not stay where there is none."""
    from melens.store import write_atomically

    if best is None:
        path.unlink(missing_ok=True)
        return
    write_atomically(path, json.dumps({"edit": best.model_dump(mode="json")}, indent=1) + "\n")
