"""How a check was made: its run, its stages, its policy and what it recommends."""

from __future__ import annotations

from dataclasses import dataclass

from melens.reporting.sections import Fact, Table
from melens.reporting.source import Source, step
from melens.results.check import CheckReport


@dataclass(frozen=True)
class Advice:
    """The recommendation and its numbers."""

    text: str
    facts: list[Fact]


def origin_facts(report: CheckReport, source: Source) -> list[Fact]:
    """Model, machine, versions and settings."""
    names = ("model", "model_revision", "weights", "dtype", "device", "seed", "git", "created")
    made = [Fact(name.replace("_", " "), source.number(f"/run/{name}")) for name in names]
    for group in ("versions", "settings"):
        for name in sorted(getattr(report.run, group)):
            made.append(Fact(name, source.number(f"/run/{group}{step(name)}")))
    return made


def stage_table(report: CheckReport, source: Source) -> Table:
    """One row a stage."""
    rows = [
        [stage.name, stage.status, source.number(f"/stages/{i}/seconds"), stage.reason or ""]
        for i, stage in enumerate(report.stages)
    ]
    return Table("Stages", ("stage", "outcome", "seconds", "why not"), rows)


def policy_table(report: CheckReport, source: Source) -> Table:
    """The policy's own numbers, rule by rule."""
    rows = []
    for rule, values in report.policy.rules.items():
        for name in values:
            at = f"/policy/rules{step(rule)}{step(name)}"
            rows.append([rule, name.replace("_", " "), source.number(at)])
    fail = f"a finding counts from severity “{report.policy.fail_on}” on"
    return Table(
        f"Policy {report.policy.name}: {fail}", ("rule", "setting", "value"), rows, folded=True
    )


def recommendation_view(report: CheckReport, source: Source) -> Advice | None:
    """What to do about the massive activation; None unless doses were tried."""
    found = report.recommendation
    if found is None:
        return None
    facts = [Fact("What to do", found.action), Fact("Edit", found.edit or "none")]
    if found.delta is not None:
        facts.append(
            Fact("Loss change (nats a token)", source.number("/recommendation/delta", "signed"))
        )
        facts.append(Fact("Its interval", source.interval("/recommendation/interval")))
    facts.append(Fact("Conditions tried", source.number("/recommendation/tried")))
    if found.source is not None:
        facts.append(Fact("Read from", source.link(found.source, found.source)))
    return Advice(found.text, facts)
