"""eval and tune."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from melens.cli import options as opt
from melens.cli import output
from melens.cli.groups import without
from melens.cli.job import Job
from melens.errors import InterventionError, PromptError
from melens.formatting import brief
from melens.protocols import JsonObject, ModelLike
from melens.registry import did_you_mean
from melens.results.base import Result

if TYPE_CHECKING:
    from melens.batches import Prompts
    from melens.inputs import Source
    from melens.results import Edit, MELayer
    from melens.settings import Compare, Items

T = TypeVar("T")
RIVALS = "zero,mean,norm-flatten,ffn-cap,drop-key"


@dataclass(frozen=True)
class EvalRun(opt.RunOptions):
    """Its seed is of something else."""

    seed: Annotated[int, opt.seed_option("Of the bootstrap.")] = 0


def evaluate(
    model: opt.Model,
    *,
    task: Annotated[
        str,
        typer.Option(
            help="perplexity, gsm8k-likelihood, math500-likelihood: the answer is given. gsm8k, "
            "math500, ifeval, xstest: it is generated (needs the extra eval)."
        ),
    ] = "perplexity",
    data: Annotated[
        Path | None,
        typer.Option(
            help="The task's file, or a folder that holds it, as gsm8k/test.jsonl "
            "(default: the bundled texts, for perplexity)."
        ),
    ] = None,
    n: Annotated[
        int | None, typer.Option("--n", "-n", min=1, help="Items (default: all; 8 texts).")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=4, help="Tokens a text at most, for perplexity. Default: 128.")
    ] = None,
    edit: opt.EditOptions,
    rates: Annotated[
        str | None,
        typer.Option(
            help="Doses: rates of a mask, strengths of another edit; or none. Default: "
            "0.1,0.25,0.5,0.75,0.9; strengths 0.25,0.5,0.75."
        ),
    ] = None,
    control_seeds: Annotated[
        str | None,
        typer.Option(help="Seeds of the random dimensions; or none. Default: 0,1,2."),
    ] = None,
    rivals: Annotated[
        str, typer.Option(help=f"Other edits beside it: {RIVALS}, all or none.")
    ] = "none",
    located: opt.Located = None,
    bos: opt.Bos = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="The chat template, for all tasks but perplexity (default: if there is one).",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a generated answer (default: the task's own).")
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens a forward pass, where the answer is given.")
    ] = 1024,
    batch_size: Annotated[
        int, typer.Option(min=1, envvar="MELENS_BATCH_SIZE", help="Answers generated at a time.")
    ] = 1,
    out: opt.OutputOptions,
    run: Annotated[EvalRun, without("batch_size")],
) -> None:
    """Hold an edit of MODEL against the unedited model on one task, item by item.

    Paired differences with 95 % bootstrap intervals over items; doses of the edit, the same edit
    in other layers and on random dimensions stand beside it. --out keeps every item's prompt,
    answer and scores in items.jsonl; the same command again goes on from there.

    Examples:
      melens eval smollm2-135m --mask-select activation --out runs/eval

      melens eval smollm2-135m --task gsm8k-likelihood --data data -n 100 --rivals all --json

      melens eval ./my-model --task ifeval --data data -n 50 --rates 0.25 --control-seeds 0
    """
    chosen = opt.edit_of(edit, model)
    compare = comparison_of(rates, control_seeds, rivals, rated=chosen.name == "wemask")
    from melens.evaluating.folder import check_folder, start_again
    from melens.evaluating.tasks import alike
    from melens.settings import Items, Run

    items = Items(data, n, length or 128, bos, chat)
    _refuse_early(task, items, chosen, length=length, max_new_tokens=max_new_tokens)
    if out.out is not None and not out.force:
        check_folder(out.out, task, chosen)
    framed, run = opt.TextOptions(bos=bos), replace(run, batch_size=batch_size)
    job = Job.of(model, run, texts=framed, out=out, located=located, edits=True)
    loaded, _ = job.load()
    from melens.evaluating.run import evaluate as measure

    if job.out is not None and out.force:
        start_again(job.out)
    texts = alike(loaded.tokenizer, task, items)
    found = _kept(job, loaded, texts) or job.locate(loaded, texts, overwrite=out.force)
    with job.bar("items") as tick:
        how = Run(
            run.seed,
            batch_tokens,
            batch_size,
            max_new_tokens,
            keep=job.out and job.out / "items.jsonl",
            progress=tick,
        )
        result = measure(
            loaded, task, chosen, me_layer=found, items=items, compare=compare, run=how
        )
    _finish(job, result)


def comparison_of(rates: str | None, seeds: str | None, rivals: str, *, rated: bool) -> Compare:
    """Doses, controls and rivals as typed.

    Raises:  InterventionError: what is none.
    """
    from melens.evaluating.edits import RIVALS as ALL
    from melens.settings import Compare

    made: JsonObject = {}
    if rates is not None:
        shares = "shares above 0 and at most 1, as 0.1,0.5"
        doses = opt.numbers_from("--rates", rates, float, shares, InterventionError, or_none=True)
        if not all(0 < dose <= 1 for dose in doses):
            raise InterventionError(f"--rates must be above 0 and at most 1, got {brief(rates)}.")
        made["rates" if rated else "strengths"] = doses
    if seeds is not None:
        made["seeds"] = seeds_of("--control-seeds", seeds)
    if rivals != "none":
        names = ALL if rivals == "all" else tuple(name.strip() for name in rivals.split(","))
        if unknown := [name for name in names if name not in ALL]:
            meant = did_you_mean(unknown[0], (*ALL, "all", "none"))
            raise InterventionError(
                f"unknown rival {brief(unknown[0], 40)}; --rivals takes all, none or "
                f"{', '.join(ALL)}.{meant}"
            )
        made["rivals"] = tuple(dict.fromkeys(names))
    return Compare(**made)


def seeds_of(option: str, text: str) -> tuple[int, ...]:
    """Seeds apart by commas, or none.

    Raises:  InterventionError: what is none.
    """
    fits = "whole numbers from 0, as 0,1"
    found = opt.numbers_from(option, text, int, fits, InterventionError, or_none=True)
    if any(not 0 <= seed < 2**63 for seed in found):
        raise InterventionError(f"{option} must be from 0, got {brief(text)}.")
    return found


def _refuse_early(
    task: str, items: Items, edit: Edit, *, length: int | None, max_new_tokens: int | None
) -> None:
    """Whatever can be refused without the model is."""
    from melens.evaluating.edits import check_edit
    from melens.evaluating.harness.data import GENERATION_TASKS
    from melens.evaluating.sources import check_source
    from melens.evaluating.tasks import LIKELIHOOD_FILES

    check_edit(edit)
    check_source(task, items)
    generates = task in GENERATION_TASKS
    if length is not None and (generates or task in LIKELIHOOD_FILES):
        raise PromptError(f"{task} takes its items whole; drop --length.")
    if max_new_tokens is not None and not generates:
        raise PromptError(f"{task} generates nothing; drop --max-new-tokens.")
    if generates and items.bos is not None:
        raise PromptError(f"{task} makes its prompts itself; drop --bos.")


def _kept(job: Job, model: ModelLike, texts: Source) -> MELayer | None:
    """The ME Layer that this evaluation located before it was interrupted, if it is this model's."""
    from melens.inputs import prepare
    from melens.results import MELayer, load_result

    if job.saved is not None or job.out is None or not (job.out / "items.jsonl").exists():
        return job.saved
    path = job.out / "locate.json"
    found = load_result(path) if path.exists() else None
    if not isinstance(found, MELayer):
        return None
    here = prepare(model, texts)
    same = (here.weights, here.settings["ids"]) == (
        found.run.weights,
        found.run.settings.get("ids"),
    )
    return found if same else None


def _finish(job: Job, result: Result) -> None:
    """Save the result and its figures, and show it."""
    output.save(result, job.out, "evaluate", "dose")
    if job.out is not None:
        output.save_picture(result, job.out / "paired", "paired")
    output.show(result, as_json=job.output.as_json, folder=job.out)


ROWS = "tune.items.jsonl"
EDIT = "edit.json"
LOSS = "perplexity"


@dataclass(frozen=True)
class TuneRun(opt.RunOptions):
    """Its seed is of something else."""

    seed: Annotated[int, opt.seed_option("Of the split and of what is drawn.")] = 0


def tune(
    model: opt.Model,
    *,
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
    explain: opt.Explain = False,
    out: opt.Output,
    run: Annotated[TuneRun, without("batch_size")],
) -> None:
    """Search for a mask that improves MODEL, and confirm it on items that were not searched on.

    Random dimensions race as controls. That no setting improves the model is a result like any
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
        "selects": _list("--selects", selects, str),
        "layers": _list("--layers", layers, opt.layers_from),
        "rates": _list("--rates", rates, float),
        "strengths": _list("--strengths", strengths, float),
    }
    job = Job.of(model, run, texts=opt.TextOptions(bos=bos), out=out, located=located)
    from melens.settings import Run
    from melens.tuning import Budget, Space
    from melens.tuning import tune as search
    from melens.tuning.items import alike_items, check_enough
    from melens.tuning.space import DEFAULT_EVALUATIONS

    space = Space(**{name: values for name, values in asked.items() if values})
    evaluations = budget or DEFAULT_EVALUATIONS if seconds is None else None
    spent = Budget(evaluations, seconds, confirm=confirm)
    kept = None if job.out is None else job.out / ROWS
    metric, texts = _what(task, data, n=n, length=length, bos=bos)
    check_enough(texts, metric, spent.held_out)
    loaded, _ = job.load()
    found = job.locate(loaded, alike_items(loaded.tokenizer, texts, metric))
    with job.bar("evaluations") as tick:
        result = search(
            loaded,
            texts,
            metric,
            spent,
            me_layer=found,
            space=space,
            run=Run(run.seed, keep=kept, progress=tick),
        )
    job.finish(result, same_texts=False, explain=explain)
    if job.out is not None:
        _save_edit(job.out / EDIT, result.best)


def _list(option: str, text: str | None, read: Callable[[str], T]) -> tuple[T, ...]:
    """Values between commas; none where the option was not given."""
    if text is None:
        return ()
    return opt.values_from(option, text, read, "numbers with commas", InterventionError)


def _what(
    task: str, data: Path | None, *, n: int | None, length: int | None, bos: bool | None
) -> tuple[str, Prompts | Items]:
    """Metric and texts; refuses an unknown task and unreadable texts before the model loads."""
    from melens.batches import prompts
    from melens.settings import Items
    from melens.tuning.items import ITEMS, objective_of

    if task == LOSS:
        source = "bundled" if data is None else data
        return "loss", prompts(source, n=n or ITEMS, length=length, bos=bos)
    objective_of(task)
    items = Items(data=data, n=n, bos=bos)
    return task, items if length is None else replace(items, length=length)


def _save_edit(path: Path, best: Edit | None) -> None:
    """The best setting; an earlier run's does not stay where there is none."""
    from melens.store import remove_file, write_atomically

    if best is None:
        remove_file(path)
        return
    write_atomically(path, json.dumps({"edit": best.model_dump(mode="json")}, indent=1) + "\n")
