"""census: every model of a machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from melens.cli import completing, output
from melens.cli import options as opt
from melens.cli.groups import without
from melens.errors import COULD_NOT_RUN
from melens.progress import progress_on

if TYPE_CHECKING:
    from melens.batches import Prompts
    from melens.results import Census

PARQUET = ".parquet"


def census(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            help="Named models, folders of models, .gguf files or Hugging Face ids (default: what "
            "the hub's cache and melens' own hold).",
            autocompletion=completing.models,
        ),
    ] = None,
    *,
    locate: Annotated[
        bool,
        typer.Option(
            "--locate",
            help="Run every model that fits into memory: locate the ME Layer, measure the sinks.",
        ),
    ] = False,
    reach: Annotated[
        bool | None,
        typer.Option(
            "--reach/--no-reach",
            help="Run a few first tokens to test each prediction, or run nothing (default: run "
            "them where the files are here and hold 8 GB at most).",
        ),
    ] = None,
    parquet: Annotated[
        Path | None, typer.Option(help="Write the table to this .parquet file too.")
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option(help="A model card (README.md) whose section on this census is updated."),
    ] = None,
    texts: opt.TextOptions,
    out: opt.Output,
    run: Annotated[opt.RunOptions, without("revision", "trust_remote_code", *opt.PLACED)],
) -> None:
    """Find the ME Layer of every model on this machine, and compare with the published record.

    Each is scanned from its weights, and with --locate run. One table, one figure: family, size,
    ME Layer and its relative depth, verdict, dimensions, largest |x|, sinks, published layer. A
    model that fails is a row with its error. Interrupted, a census with --out goes on where it
    was.

    Examples:
      melens census smollm2-135m --no-reach --out runs/census

      melens census ./models --locate --parquet runs/census.parquet

      melens census --locate --out runs/machine --card README.md
    """
    _refuse_files(out.out, parquet, card)
    source = output.source(texts.text, texts.prompt, lines=texts.lines)
    from melens.comparing.surveying import Survey, remove_kept
    from melens.comparing.surveying import census as look

    how = run.loading()
    survey = Survey(
        locate=locate,
        reach=reach,
        device=how["device"],
        dtype=how["dtype"],
        batch_size=run.batch_size,
        seed=run.seed,
    )
    with progress_on("models") as tick:
        result = look(
            models or (), _prompts(source, texts), survey=survey, out=out.out, progress=tick
        )
    output.save(result, out.out, "census", "census")
    if out.out is not None:
        remove_kept(out.out)
    _write_files(result, parquet, card)
    output.show(result, as_json=out.as_json, folder=out.out)
    if result.models and all(row.error for row in result.models):
        raise typer.Exit(COULD_NOT_RUN)


def _prompts(source: str | Path | Sequence[str], texts: opt.TextOptions) -> Prompts:
    from melens.batches import prompts

    return prompts(source, n=texts.n_seq, length=texts.length, bos=texts.bos, chat=texts.chat)


def _refuse_files(folder: Path | None, parquet: Path | None, card: Path | None) -> None:
    """Refuse what could not be written at the end, before any model is read."""
    output.refuse_unwritable(folder)
    if parquet is not None:
        if parquet.suffix.lower() != PARQUET:
            raise typer.BadParameter(f"--parquet {parquet}: name a file that ends in {PARQUET}.")
        output.refuse_unwritable_file("--parquet", parquet.resolve())
    if card is not None:
        from melens.reporting import refuse_bad_card
        from melens.reporting.card import CENSUS

        refuse_bad_card(card, CENSUS)
        output.refuse_unwritable_file("--card", card.resolve())


def _write_files(result: Census, parquet: Path | None, card: Path | None) -> None:
    if parquet is not None:
        from melens.results.tabular import flat, parquet_of
        from melens.store import write_atomically

        write_atomically(parquet, parquet_of([flat(row) for row in result.rows()]))
    if card is not None:
        from melens.reporting import update_census_card

        update_census_card(card, result)
