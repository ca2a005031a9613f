"""long-context: an edit's effect on what is found in long texts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from melens.cli import options as opt
from melens.cli.groups import without
from melens.cli.job import Job
from melens.errors import PromptError

ITEMS = "items.jsonl"
BETWEEN = "numbers with commas between"


class LongTask(StrEnum):
    """What is hidden in the text."""

    passkey = "passkey"
    needles = "needles"


@dataclass(frozen=True)
class LongRun(opt.RunOptions):
    """Its seed is of something else."""

    seed: Annotated[int, opt.seed_option("Draws other numbers and places.")] = 0


def long_context(
    model: opt.Model,
    *,
    task: Annotated[
        LongTask,
        typer.Option(
            help="passkey: one number. needles: several cities' numbers, one of them asked for."
        ),
    ] = LongTask.passkey,
    lengths: Annotated[
        str, typer.Option(help="Tokens an item, question and answer included; commas between.")
    ] = "256,512,1024",
    depths: Annotated[
        str, typer.Option(help="Where the answer stands in the text: 0 = first, 1 = last.")
    ] = "0,0.25,0.5,0.75,1",
    seeds: Annotated[int, typer.Option(min=1, help="Items a length and depth.")] = 3,
    needles: Annotated[
        int, typer.Option(min=2, max=30, help="Numbers in an item; of --task needles.")
    ] = 4,
    text: Annotated[
        Path | None,
        typer.Option(
            help="A UTF-8 file to hide them in, - is stdin (default: the bundled English prose, "
            "repeated where it is too short)."
        ),
    ] = None,
    texts: Annotated[
        int,
        typer.Option(
            min=0, help="Plain texts, as long as the longest item, for loss by position; 0 = none."
        ),
    ] = 8,
    edit: opt.EditOptions,
    located: opt.Located = None,
    bos: opt.Bos = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Put text and question through the chat template, the answer begun."
        ),
    ] = False,
    out: opt.Output,
    run: Annotated[LongRun, without("batch_size")],
) -> None:
    """Find hidden numbers in long texts with MODEL, with an edit and without it.

    Over length and depth, beside a dose below and above and both controls (other layers, random
    dimensions); and the loss of plain texts by position. An answer counts if greedy decoding
    gives it. With --out an interrupted run goes on where it was when the same command is given
    again.

    Examples:
      melens long-context smollm2-135m --text book.txt --out runs/passkey

      melens long-context smollm2-135m --task needles --needles 4 --lengths 256,1024 --chat
      --mask-select activation --mask-rate 0.1 --texts 0
    """
    sizes = opt.numbers_from("--lengths", lengths, int, f"whole {BETWEEN}", PromptError)
    places = opt.numbers_from("--depths", depths, float, BETWEEN, PromptError)
    framed = opt.TextOptions(bos=bos, chat=chat)
    job = Job.of(model, run, texts=framed, out=out, located=located, edits=True)
    chosen = opt.edit_of(edit, model)
    from melens.evaluating.haystack import Haystack

    haystack = Haystack(
        task=task.value,
        lengths=sizes,
        depths=places,
        seeds=seeds,
        needles=needles,
        text=_read(text),
        bos=bos,
        chat=chat,
        seed=run.seed,
        plain=texts,
    )
    from melens.evaluating.edits import check_edit
    from melens.evaluating.long_context import items_of
    from melens.evaluating.long_context import long_context as measure
    from melens.settings import Run

    check_edit(chosen)
    loaded, prompts = job.load()
    items_of(loaded, haystack)  # refuses what does not fit, before locating
    found = job.locate(loaded, prompts)
    items = job.out / ITEMS if job.out is not None else None
    with job.bar("items") as tick:
        how = Run(seed=run.seed, keep=items, progress=tick)
        result = measure(loaded, chosen, me_layer=found, haystack=haystack, run=how)
    job.finish(result, same_texts=False)


def _read(text: Path | None) -> str | None:
    """The text itself: stdin can be read only once."""
    if text is None:
        return None
    from melens.batches import prompts

    return prompts("-" if str(text) == "-" else text).texts[0]
