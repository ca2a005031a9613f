"""check(): measure a model stage by stage, hold it against a policy, say one verdict."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from melens.checking.budgets import CheckStage, stages_of
from melens.checking.findings import Measured
from melens.checking.keeping import Keeper
from melens.checking.policy import Policy, read_policy
from melens.checking.resuming import answered_before, asked_of, remember
from melens.checking.trimming import compact
from melens.checking.verdict import answered, judged, recommended
from melens.errors import MelensError, ModelError, OutputError, ResultError
from melens.protocols import HookedModel
from melens.provenance import ModelFacts, RunInfo
from melens.results import CheckReport, Evaluation, MELayer, StageRecord
from melens.results.base import Result, load_result
from melens.results.check import REPORT_JSON
from melens.settings import Progress, require_path
from melens.store import write_atomically

if TYPE_CHECKING:
    from melens.checking.bench import Bench
    from melens.inputs import Source

StageProgress = Callable[[str, int, int], None]
"""(stage, thousandths of the expected work done, 1000)."""
WHOLE = 1000
LONGEST_REASON = 300


def check(
    model: HookedModel,
    prompts: Source = None,
    *,
    budget: str = "quick",
    policy: str | Path | Policy | None = None,
    out: str | Path | None = None,
    progress: StageProgress | None = None,
) -> CheckReport:
    """Check a model before it is deployed: locate, describe, look for what could go wrong.

    Args:    model: anything ``melens.load`` takes.
             prompts: texts, as for ``melens.locate``; None = the bundled ones, 8 x 128 tokens.
             budget: ``quick``: locate, describe, collapse, sinks, keys and values, attention of a
             few heads, published numbers. ``standard`` adds isolation, super weights, and the loss
             in the policy's number formats, without the massive coordinate and without the sink's
             key. ``full`` adds the mask's
             doses with their controls, and a recommendation.
             policy: a preset (default, strict, research), a TOML file, or a Policy.
             out: folder for report.json and, under stages/, each stage as soon as it is finished;
             what is there of the same model, texts and version is not measured again. None =
             nothing is written.
             progress: called with (stage, thousandths of the expected work done, 1000).
    Returns: a frozen :class:`CheckReport`; a stage that this model cannot have is recorded as
             failed, and the others go on.
    Raises:  PolicyError: a policy that cannot be read, before the model is loaded.
             UnknownNameError: no such budget. OutputError: ``out`` cannot be written.
             PromptError, ModelError: as ``melens.locate``, without which there is nothing to say.
    """
    folder, rules = None if out is None else require_path("out", out), read_policy(policy)
    stages_of(budget)
    asked = None if folder is None else asked_of(model, prompts)
    report = take_up(folder, asked, budget=budget, policy=rules, progress=progress)
    if report is not None:
        return report
    from melens.checking.bench import Bench

    bench = Bench.of(model, prompts, budget, rules.schemes)
    keeper = Keeper.of(folder, bench)
    records = _through(budget, progress, lambda stage, tick: _run(stage, bench, keeper, tick))
    report = _report(bench.run_info(), budget, rules, bench.results, records)
    _write(folder, asked, report)
    return report


def take_up(
    folder: Path | None,
    asked: str | None,
    *,
    budget: str,
    policy: Policy,
    progress: StageProgress | None = None,
) -> CheckReport | None:
    """The report of stages that are all kept, without the model; None where one is missing.

    Where the folder's own report says the same it is that one, and nothing is written.

    Args:    asked: as :func:`melens.checking.resuming.asked_of` says it.
    """
    before = None if folder is None or asked is None else answered_before(folder, asked)
    if before is None:
        return None
    keeper, run = replace(before[0], schemes=tuple(policy.schemes)), before[1]
    results: dict[str, Result] = {}
    held = [_held(stage, results, keeper) for stage in stages_of(budget)]
    records = [record for record in held if record is not None]
    if len(records) < len(held):
        return None
    told = dict(zip((record.name for record in records), records, strict=True))
    _through(budget, progress, lambda stage, _: told[stage.name])
    facts = ModelFacts(run.model, run.model_revision, run.weights, run.dtype, run.device)
    now = RunInfo.collect(facts, seed=run.seed, settings={**run.settings, "budget": budget})
    report = _report(now, budget, policy, results, records)
    if (same := _written(keeper.folder)) is not None and same.timeless() == report.timeless():
        return same
    _write(keeper.folder, None, report)
    return report


def _written(folder: Path | None) -> CheckReport | None:
    """The report that lies in a folder; None where there is none, or a damaged one."""
    try:
        found = None if folder is None else load_result(folder / REPORT_JSON)
    except ResultError:
        return None
    return found if isinstance(found, CheckReport) else None


def _through(
    budget: str,
    progress: StageProgress | None,
    record: Callable[[CheckStage, Progress], StageRecord],
) -> list[StageRecord]:
    """Every stage in order, and how far that is."""
    wanted = stages_of(budget)
    work, done, records = sum(stage.work for stage in wanted), 0.0, []
    for stage in wanted:

        def tick(n: int, total: int, stage: CheckStage = stage, before: float = done) -> None:
            if progress is not None:
                share = (before + stage.work * min(1.0, n / max(total, 1))) / work
                progress(stage.name, round(WHOLE * share), WHOLE)

        tick(0, 1)
        records.append(record(stage, tick))
        tick(1, 1)
        done += stage.work
    return records


def _held(stage: CheckStage, results: dict[str, Result], keeper: Keeper) -> StageRecord | None:
    """A stage that has nothing to measure, or was measured in an earlier run."""
    located = results.get("locate")
    if isinstance(located, MELayer) and (why := stage.unneeded(located)):
        return StageRecord(name=stage.name, status="skipped", seconds=0.0, reason=why)
    if stage.name == "quantise" and not keeper.schemes:
        why = "the policy names no number format"
        return StageRecord(name=stage.name, status="skipped", seconds=0.0, reason=why)
    if (kept := keeper.read(stage.name)) is None:
        return None
    results[stage.name] = kept[0]
    return StageRecord(name=stage.name, status="done", seconds=kept[1], reason=None)


def _run(stage: CheckStage, bench: Bench, keeper: Keeper, tick: Progress) -> StageRecord:
    """One stage: taken up from an earlier run, skipped, or measured now and kept."""
    from melens.checking.stages import MAKERS

    if (held := _held(stage, bench.results, keeper)) is not None:
        return held
    start = time.perf_counter()
    try:
        result = MAKERS[stage.name](bench, tick)
    except (MelensError, RuntimeError, MemoryError) as error:
        if isinstance(error, OutputError) or stage.name == "locate":
            raise
        seconds = round(time.perf_counter() - start, 2)
        # a model that cannot be rounded has no such number; nothing went wrong
        status = "skipped" if stage.name == "quantise" and type(error) is ModelError else "failed"
        return StageRecord(name=stage.name, status=status, seconds=seconds, reason=_line(error))
    seconds = round(time.perf_counter() - start, 2)
    bench.results[stage.name] = result
    keeper.write(stage.name, result, seconds)
    return StageRecord(name=stage.name, status="done", seconds=seconds, reason=None)


def _write(folder: Path | None, asked: str | None, report: CheckReport) -> None:
    """The report, and what it answers: the same question again needs no model."""
    if folder is None:
        return
    write_atomically(folder / REPORT_JSON, report.to_json())
    if asked is not None:
        remember(folder, asked, report)


def _line(error: BaseException) -> str:
    """An error as one line; a foreign one with its type."""
    said = " ".join(str(error).split())[:LONGEST_REASON] or "no reason given"
    return said if isinstance(error, MelensError) else f"{type(error).__name__}: {said}"


def _report(
    run: RunInfo,
    budget: str,
    policy: Policy,
    results: dict[str, Result],
    records: list[StageRecord],
) -> CheckReport:
    outcomes, findings = judged(Measured(results, run, tuple(policy.schemes)), policy, records)
    verdict, answer = answered(run.subject, policy, findings, outcomes, records)
    dose = results.get("dose")
    return CheckReport(
        model=run.model,
        verdict=verdict,  # type: ignore[arg-type]
        answer=answer,
        budget=budget,  # type: ignore[arg-type]
        policy=policy.used(),
        stages=tuple(records),
        findings=findings,
        rules=outcomes,
        results={name: compact(result).to_dict() for name, result in results.items()},
        recommendation=recommended(dose) if isinstance(dose, Evaluation) else None,
        run=run,
    )
