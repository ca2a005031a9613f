"""check(): measure a model stage by stage, hold it against a policy, say one verdict."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from melens.checking.bench import Bench
from melens.checking.findings import Measured
from melens.checking.keeping import Keeper
from melens.checking.policy import Policy, read_policy
from melens.checking.stages import CheckStage, stages_of
from melens.checking.trimming import compact
from melens.checking.verdict import answered, judged, recommended
from melens.errors import MelensError, OutputError
from melens.inputs import Source
from melens.results import CheckReport, Evaluation, StageRecord
from melens.results.base import Result
from melens.store import write_atomically

Progress = Callable[[str, int, int], None]
"""(stage, thousandths of the expected work done, 1000)."""
WHOLE = 1000
REPORT = "report.json"
LONGEST_REASON = 300


def check(
    model: Any,
    prompts: Source = None,
    *,
    budget: str = "quick",
    policy: str | Path | Policy | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Check a model before it is deployed: locate, describe, look for what could go wrong.

    Args:    model: anything ``melens.load`` takes.
             prompts: texts, as for ``melens.locate``; None = the bundled ones, 8 x 128 tokens.
             budget: ``quick``: locate, describe, collapse, sinks, keys and values, attention of a
             few heads, published numbers. ``standard`` adds isolation, super weights, and the loss
             without the massive coordinate and without the sink's key. ``full`` adds the mask's
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
    wanted, rules = stages_of(budget), read_policy(policy)
    folder = None if out is None else Path(out)
    bench = Bench.of(model, prompts, budget)
    keeper = Keeper.of(folder, bench)
    work, done, records = sum(stage.work for stage in wanted), 0.0, []
    for stage in wanted:

        def tick(n: int, total: int, stage: CheckStage = stage, before: float = done) -> None:
            if progress is not None:
                share = (before + stage.work * min(1.0, n / max(total, 1))) / work
                progress(stage.name, round(WHOLE * share), WHOLE)

        tick(0, 1)
        records.append(_run(stage, bench, keeper, tick))
        tick(1, 1)
        done += stage.work
    report = _report(bench, rules, records)
    if folder is not None:
        write_atomically(folder / REPORT, report.to_json())
    return report


def _run(
    stage: CheckStage, bench: Bench, keeper: Keeper, tick: Callable[[int, int], None]
) -> StageRecord:
    """One stage: taken up from an earlier run, skipped, or measured now and kept."""
    if stage.token and (why := stage.unneeded(bench.located)):
        return StageRecord(name=stage.name, status="skipped", seconds=0.0, reason=why)
    if (kept := keeper.read(stage.name)) is not None:
        bench.results[stage.name] = kept[0]
        return StageRecord(name=stage.name, status="done", seconds=kept[1], reason=None)
    start = time.perf_counter()
    try:
        result = stage.make(bench, tick)
    except (MelensError, RuntimeError, MemoryError) as error:
        if isinstance(error, OutputError) or stage.name == "locate":
            raise
        seconds = round(time.perf_counter() - start, 2)
        return StageRecord(name=stage.name, status="failed", seconds=seconds, reason=_line(error))
    seconds = round(time.perf_counter() - start, 2)
    bench.results[stage.name] = result
    keeper.write(stage.name, result, seconds)
    return StageRecord(name=stage.name, status="done", seconds=seconds, reason=None)


def _line(error: BaseException) -> str:
    """An error as one line; a foreign one with its type."""
    said = " ".join(str(error).split())[:LONGEST_REASON] or "no reason given"
    return said if isinstance(error, MelensError) else f"{type(error).__name__}: {said}"


def _report(bench: Bench, policy: Policy, records: list[StageRecord]) -> CheckReport:
    run = bench.run_info()
    results: dict[str, Result] = bench.results
    outcomes, findings = judged(Measured(results, run), policy, records)
    verdict, answer = answered(run.subject, policy, findings, outcomes, records)
    dose = results.get("dose")
    return CheckReport(
        model=run.model,
        verdict=verdict,  # type: ignore[arg-type]
        answer=answer,
        budget=bench.budget,  # type: ignore[arg-type]
        policy=policy.used(),
        stages=tuple(records),
        findings=findings,
        rules=outcomes,
        results={name: compact(result).to_dict() for name, result in results.items()},
        recommendation=recommended(dose) if isinstance(dose, Evaluation) else None,
        run=run,
    )
