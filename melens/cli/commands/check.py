"""check."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from melens.cli import options as opt
from melens.cli import output
from melens.cli.groups import without
from melens.cli.job import Job
from melens.errors import COULD_NOT_RUN
from melens.progress import progress_on, remark

if TYPE_CHECKING:
    from melens.results import CheckReport

FOUND = 1
EXIT_CODES = {"pass": 0, "findings": FOUND, "incomplete": COULD_NOT_RUN}


class BudgetName(StrEnum):
    """How much is measured."""

    quick = "quick"
    standard = "standard"
    full = "full"


def check(
    model: opt.Model,
    *,
    policy: Annotated[
        str,
        typer.Option(help="default, strict or research, or a .toml file of your own."),
    ] = "default",
    budget: Annotated[
        BudgetName,
        typer.Option(
            help="quick: locate, describe, collapse, sinks, cache; standard: isolation, super "
            "weights and what edits cost too; full: the mask's doses and a recommendation too."
        ),
    ] = BudgetName.quick,
    junit: Annotated[
        Path | None, typer.Option(help="Write the rules as JUnit test cases to this file.")
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option(help="A model card (README.md) whose section on this check is updated."),
    ] = None,
    texts: opt.TextOptions,
    out: opt.Output,
    run: Annotated[opt.RunOptions, without("batch_size", "seed")],
) -> None:
    """Check MODEL before it is deployed: one verdict, one page, every number behind it.

    Exit codes: 0 within the policy, 1 a finding that the policy counts, 2 bad usage, 3 could not
    run or not in full, 130 interrupted. --out gets report.html, report.md, report.json, a figure of
    every stage that has one (figures/STAGE.png and .svg, as figures/locate.svg) and every finished
    stage; the same command again goes on from there.

    Examples:
      melens check smollm2-135m --out runs/check

      melens check ./my-model --policy strict --budget full --out runs/check --junit check.xml

      melens check ./my-model --policy policy.toml --card ./my-model/README.md
    """
    job = Job.of(model, run, texts=texts, out=out)
    _check_files(junit, card)
    from melens.checking import check as measure
    from melens.checking import junit_xml, read_policy
    from melens.checking.resuming import asked_of, remember
    from melens.checking.run import take_up
    from melens.store import write_atomically

    rules, held = read_policy(policy), _stages_in(job.out)
    asked = None if job.out is None else asked_of(job.model, job.source, **job.choices())
    report = take_up(job.out, asked, budget=budget.value, policy=rules)
    if report is None:
        loaded, prompts = job.load()
        with progress_on(None) as shown:
            report = measure(
                loaded,
                prompts,
                budget=budget.value,
                policy=rules,
                out=job.out,
                progress=lambda stage, done, total: shown(done, total, stage),
            )
        if job.out is not None and asked is not None:
            remember(job.out, asked, report)
    _say_taken_up(held, job.out)
    _pages(report, job.out, card)
    if junit is not None:
        write_atomically(junit, junit_xml(report))
    output.show(report, as_json=out.as_json, folder=job.out)
    raise typer.Exit(EXIT_CODES[report.verdict])


def _check_files(junit: Path | None, card: Path | None) -> None:
    """Refuse files that cannot be written, before any work.

    Raises:  OutputError: naming the file. ResultError: a card whose section has no clear bounds.
    """
    if junit is not None and str(junit) == "-":
        raise typer.BadParameter("--junit - is not a file; name a file to write.")
    if junit is not None:
        output.refuse_unwritable_file("--junit", junit)
    if card is not None and not card.is_file():
        raise typer.BadParameter(f"--card {card} is not a file; give the README.md of the model.")
    if card is not None:
        from melens.reporting import refuse_bad_card

        refuse_bad_card(card)
        output.refuse_unwritable_file("--card", card.resolve())


def _pages(report: CheckReport, folder: Path | None, card: Path | None) -> None:
    """The page, the text and the card, all from the report."""
    if folder is None and card is None:
        return
    from melens.reporting import update_card, write_report

    if folder is not None and not _drawn(report, folder):
        output.save_figures(report, folder)
        write_report(report, folder)
    if card is not None:
        update_card(card, report)


def _drawn(report: CheckReport, folder: Path) -> bool:
    """Whether the pages that lie there are this report's: drawing them is most of a second run.

    The text, which says when it was made, is written after the page.
    """
    from melens.reporting import markdown_report
    from melens.results.check import REPORT_JSON

    try:
        same = (folder / "report.md").read_text("utf-8") == markdown_report(report)
        held = (folder / REPORT_JSON).read_text("utf-8")
        names = [f"{output.FIGURES}/{stage}.svg" for stage in output.drawable(report)]
        there = all((folder / name).is_file() for name in ("report.html", *names))
        return same and there and held == report.to_json()
    except (OSError, ValueError):
        return False


def _stages_in(folder: Path | None) -> dict[str, int]:
    """Stages that are kept, and when each was finished (ns)."""
    kept = [] if folder is None else sorted(folder.glob("stages/*.key"))
    return {path.stem: path.stat().st_mtime_ns for path in kept}


def _say_taken_up(before: dict[str, int], folder: Path | None) -> None:
    """Name the stages of an earlier run that this one did not measure again."""
    names = [name for name, at in _stages_in(folder).items() if before.get(name) == at]
    if names:
        remark(f"taken up from {folder}/stages: {', '.join(names)}")
