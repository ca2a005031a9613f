"""CheckReport: one verdict on a model before it ships, with every measurement behind it."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from melens.errors import ResultError
from melens.formatting import Interval
from melens.protocols import JsonObject
from melens.provenance import RunInfo
from melens.results.base import Part, Result, added_later, kind_of, look_up
from melens.results.locate import MELayer

REPORT_JSON = "report.json"
"""What a folder of a check keeps its report as."""


class CacheRow(Part):
    """One site of one layer, in the head where the massive token stands out most."""

    layer: int
    site: Literal["k", "k_norm", "rot_k", "v"]
    """Keys as they are kept where that can be read (after RoPE), else the last site before."""
    head: int
    token: float
    """Largest |entry| of the massive tokens."""
    others: float
    """Median over the other tokens of a token's largest |entry|, averaged over sequences."""
    ratio: float
    """token / others."""


class CacheNorms(Result):
    """Keys and values of massive tokens against those of other tokens, layer by layer."""

    schema_id: ClassVar[str] = "melens/cache-norms/1"

    kind: Literal["cache-norms"] = "cache-norms"
    schema_: Literal["melens/cache-norms/1"] = Field(default="melens/cache-norms/1", alias="schema")
    me_layer: int | None
    n_layers: int
    rows_: tuple[CacheRow, ...] = Field(alias="rows")
    missing: tuple[str, ...]
    """Sites that this model does not show, with the reason."""
    run: RunInfo

    @model_validator(mode="after")
    def _fits_together(self) -> CacheNorms:
        """Refuse what no run can have made."""
        if any(not 0 <= row.layer < self.n_layers or row.head < 0 for row in self.rows_):
            raise ValueError("layers count from 0 to n_layers - 1, heads from 0")
        return self

    def rows(self) -> list[JsonObject]:
        """One row a layer and site."""
        return [row.model_dump() for row in self.rows_]

    @property
    def worst(self) -> int | None:
        """Index of the row with the largest ratio."""
        ratios = [row.ratio for row in self.rows_]
        return ratios.index(max(ratios)) if ratios else None

    def summary(self) -> str:
        """One plain sentence; layers count from 0."""
        if self.worst is None:
            return f"{self.run.subject}: no massive token's keys or values to compare."
        row = self.rows_[self.worst]
        what = "value" if row.site == "v" else "key"
        return (
            f"{self.run.subject}: the massive token's {what} stands out most at layer {row.layer}, "
            f"head {row.head} (counted from 0): largest |entry| {row.token:.3g} against "
            f"{row.others:.3g}, {row.ratio:.3g} times."
        )


Budget = Literal["quick", "standard", "full"]
Severity = Literal["info", "warning", "critical"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "critical")
"""From least to most severe."""
Number = float | int | str | None


class StageRecord(Part):
    """One stage of the check, in the order in which they run."""

    name: str
    status: Literal["done", "skipped", "failed"]
    seconds: float
    """Of the run that finished it; 0 where it was skipped."""
    reason: str | None
    """Why it was skipped or failed, one line; None where it is done."""


class Finding(Part):
    """Something that the policy has a word on, with the number that says so."""

    id: str
    severity: Severity
    title: str
    """What was found, a short sentence."""
    value: float
    unit: str
    threshold: float
    """The policy's, in the same unit."""
    why: str
    """Why it matters to someone who deploys the model."""
    advice: str
    """What to do about it."""
    evidence: dict[str, Number]
    """Further numbers behind it, by name."""
    source: str
    """JSON pointer into this report to what ``value`` was read from."""


class RuleOutcome(Part):
    """What became of one rule, found or not."""

    id: str
    title: str
    """What the rule looks for."""
    status: Literal["passed", "found", "not measured", "off"]
    value: float | None
    """None where it was not measured, or has no number."""
    unit: str
    threshold: float | None
    reason: str | None
    """Why it was not measured, or is off."""
    source: str | None


class PolicyUsed(Part):
    """The policy by which the verdict was reached, in full."""

    name: str
    fail_on: Severity | Literal["never"]
    """Findings of this severity or a graver one make the verdict."""
    rules: dict[str, dict[str, Number]]
    """Rule id -> its severity and thresholds."""
    schemes: tuple[str, ...] = added_later(())
    """Number formats whose loss the rule quantised-loss looks at."""


class Recommendation(Part):
    """Whether to mask, from the doses that were tried."""

    action: Literal["leave it", "mask"]
    text: str
    edit: str | None
    """The edit's label; None where nothing is to be done."""
    delta: float | None
    """Its loss minus the unedited loss, nats a token, paired."""
    interval: Interval | None
    """Of ``delta``: bootstrapped over texts, as wide as ``tried`` conditions ask for."""
    tried: int
    """Conditions that the interval was widened for (Bonferroni)."""
    source: str | None


class CheckReport(Result):
    """The pre-deployment check of one model."""

    schema_id: ClassVar[str] = "melens/check/1"

    kind: Literal["check"] = "check"
    schema_: Literal["melens/check/1"] = Field(default="melens/check/1", alias="schema")
    model: str
    verdict: Literal["pass", "findings", "incomplete"]
    """findings: at least one that the policy counts. incomplete: none, but a stage failed."""
    answer: str
    """One sentence for someone who reads nothing else."""
    budget: Budget
    policy: PolicyUsed
    stages: tuple[StageRecord, ...]
    findings: tuple[Finding, ...]
    """The most severe first."""
    rules: tuple[RuleOutcome, ...]
    """Every rule there is, in the order of the registry."""
    results: dict[str, JsonObject]
    """Stage or result name -> the finished result as its own JSON."""
    recommendation: Recommendation | None
    """None unless the doses were tried (budget full)."""
    run: RunInfo

    @model_validator(mode="after")
    def _fits_together(self) -> CheckReport:
        """Refuse what no run can have made; the page relies on it."""
        for name in self.results:
            self.result(name)
        ids = {rule.id for rule in self.rules if rule.status == "found"}
        if {finding.id for finding in self.findings} != ids:
            raise ValueError("findings and the rules that found something must be the same")
        pointed = [*self.findings, *self.rules, self.recommendation]
        for source in [place.source for place in pointed if place is not None]:
            if source is not None:
                self.at(source)
        if self.verdict != self._verdict():
            raise ValueError(f"the verdict must be {self._verdict()!r} for these findings")
        return self

    def _verdict(self) -> str:
        if self.counted():
            return "findings"
        failed = any(stage.status == "failed" for stage in self.stages)
        return "incomplete" if failed else "pass"

    def counted(self) -> tuple[Finding, ...]:
        """The findings that the policy lets decide the verdict."""
        if self.policy.fail_on == "never":
            return ()
        least = SEVERITIES.index(self.policy.fail_on)
        return tuple(f for f in self.findings if SEVERITIES.index(f.severity) >= least)

    def result(self, name: str) -> Result:
        """One embedded result, read by its own class.

        Raises:  ResultError: none of that name, or not one that this version reads.
        """
        if name not in self.results:
            held = ", ".join(self.results) or "none"
            raise ResultError(f"this report holds no result '{name}'; it holds {held}.")
        data = self.results[name]
        if name in self._read and self._read[name][0] is data:
            return self._read[name][1]
        found = data.get("schema")
        kind = kind_of(found) if isinstance(found, str) else None
        if kind is None or found == self.schema_id:
            raise ResultError(f"results.{name} has schema {found!r}, which no report can hold.")
        made = kind.validated(json.dumps(data))
        self._read[name] = data, made
        return made

    @cached_property
    def _read(self) -> dict[str, tuple[JsonObject, Result]]:
        """Results that were read already, beside the JSON that they were read from."""
        return {}

    def located(self) -> MELayer:
        """The ME Layer that the check located.

        Raises:  ResultError: its locate stage did not finish.
        """
        found = self.result("locate") if "locate" in self.results else None
        if not isinstance(found, MELayer):
            raise ResultError(
                "this is a report whose locate stage did not finish; run the check again."
            )
        return found

    def at(self, pointer: str) -> Any:
        """What a JSON pointer into this report names: in its results, its stages or its run.

        Raises:  ResultError: nothing is there.
        """
        held = {
            "results": self.results,
            "run": self.run.model_dump(),
            "stages": [stage.model_dump() for stage in self.stages],
        }
        return look_up(held, pointer)

    def timeless(self) -> JsonObject:
        """All but when, by which command and from which checkout: equal for equal checks,
        resumed or not.
        """  # noqa: D205
        data = self.to_dict()
        for stage in data["stages"]:
            stage.pop("seconds")
        for run in [data["run"], *(held.get("run", {}) for held in data["results"].values())]:
            for name in ("created", "command", "git"):
                run.pop(name, None)
        return data

    def rows(self) -> list[JsonObject]:
        """One row a finding."""
        return [finding.model_dump(mode="json") for finding in self.findings]

    def shown(self) -> list[JsonObject]:
        """One row a rule, found or not."""
        grave = {finding.id: finding.severity for finding in self.findings}
        keep = ("id", "status", "value", "threshold", "unit", "title")
        return [
            {"severity": grave.get(rule.id, ""), **{key: getattr(rule, key) for key in keep}}
            for rule in self.rules
        ]

    def summary(self) -> str:
        """The answer."""
        return self.answer
