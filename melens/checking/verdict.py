"""From measurements to findings, a recommendation, a verdict and one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from melens.checking.budgets import STAGES
from melens.checking.findings import RULES, Judgement, Measured, Rule, Unmeasured
from melens.checking.findings.core import nothing
from melens.checking.policy import Policy, RulePolicy
from melens.formatting import counted, within
from melens.results import Evaluation, Finding, Recommendation, RuleOutcome, StageRecord
from melens.results.check import SEVERITIES

if TYPE_CHECKING:
    from torch import Tensor


def judged(
    view: Measured, policy: Policy, stages: Sequence[StageRecord]
) -> tuple[tuple[RuleOutcome, ...], tuple[Finding, ...]]:
    """Every rule's outcome in the registry's order, and what was found, the most severe first."""
    why_not = {stage.name: stage for stage in stages if stage.status != "done"}
    outcomes, findings = [], []
    for name, one in RULES.items():
        says = policy.rules[name]
        found = _answer(one, says, view, why_not)
        outcomes.append(_outcome(one, says, found))
        if isinstance(found, Judgement) and found.found:
            findings.append(_finding(one, says, found))
    findings.sort(key=lambda finding: -SEVERITIES.index(finding.severity))
    return tuple(outcomes), tuple(findings)


def _answer(
    one: Rule, says: RulePolicy, view: Measured, why_not: Mapping[str, StageRecord]
) -> Judgement | Unmeasured | None:
    """None where the policy turned the rule off."""
    if says.severity == "off":
        return None
    for need in one.card.needs:
        if need in view.results:
            continue
        stage = why_not.get(need)
        if stage is None:
            return Unmeasured(f"it needs the stage {need} (--budget {STAGES[need].budget})")
        if stage.status == "skipped":
            return nothing(stage.reason or "") if need == "quantise" else nothing()
        return Unmeasured(f"the stage {need} could not run")
    return one.judge(view, says.threshold)


def _outcome(one: Rule, says: RulePolicy, found: Judgement | Unmeasured | None) -> RuleOutcome:
    told = found if isinstance(found, Judgement) else None
    status = "off" if found is None else "not measured"
    if told is not None:
        status = "found" if told.found else "passed"
    reason = found.reason if isinstance(found, Unmeasured) else None
    if status == "off":
        reason = "the policy turns it off"
    elif told is not None and told.value is None:
        reason = told.reason
    return RuleOutcome(
        id=one.card.id,
        title=one.card.looks_for,
        status=status,
        unit=one.card.unit,
        value=told and told.value,
        threshold=None if status == "off" else says.threshold,
        reason=reason,
        source=told and told.source,
    )


def _finding(one: Rule, says: RulePolicy, found: Judgement) -> Finding:
    assert says.severity != "off"
    assert found.value is not None
    assert found.source is not None
    return Finding(
        id=one.card.id,
        severity=says.severity,
        title=found.title,
        value=found.value,
        unit=one.card.unit,
        threshold=says.threshold,
        why=found.why or one.card.why,
        advice=found.advice or one.card.advice,
        evidence=found.evidence,
        source=found.source,
    )


def recommended(dose: Evaluation) -> Recommendation:
    """Mask only where a dose lowers the loss, and by more than every control does, beyond doubt.

    Intervals are bootstrapped over texts and as wide as the number of doses tried asks for
    (Bonferroni); differences to controls are paired.
    """
    from melens.intervals import LEAST_OF_MANY, weighted_mean

    doses = [dose.edited, *dose.dose]
    best = min(doses, key=lambda score: score.delta.value if score.delta else 0.0)
    assert best.delta is not None
    weights, apart = _apart(dose)
    interval = weighted_mean(apart[best.name], weights, tests=len(doses)).interval
    place = dose.dose.index(best) if best in dose.dose else None
    where = "edited" if place is None else f"dose/{place}"
    said = f"{best.edit.label} changes the loss by {best.delta.value:+.3g} nats a token"
    said += f"{within(interval, '+.3g')} over {dose.n} texts"
    lower = interval is not None and interval[1] < 0
    equals = [c.name for c in dose.controls if not _below(apart, best.name, c.name, weights, doses)]
    if lower and not dose.controls:
        action, text = "leave it", f"Leave it: {said}, but it was compared with no control."
    elif lower and not equals:
        action = "mask"
        text = f"Mask: {said}, and each of {len(dose.controls)} controls lowers it less. "
        text += "What the mask does to tasks was not measured."
    elif lower:
        action = "leave it"
        text = f"Leave it: {said}, but no more than a control does ({', '.join(equals)})."
    else:
        few = f" One of several doses takes {LEAST_OF_MANY} texts or more to be told from chance."
        action, text = (
            "leave it",
            f"Leave it: no dose lowers the loss beyond doubt. The best, {said}."
            + few * (dose.n < LEAST_OF_MANY),
        )
    return Recommendation(
        action=action,
        text=text,
        edit=best.edit.label if action == "mask" else None,
        delta=best.delta.value,
        interval=interval,
        tried=len(doses),
        source=f"/results/dose/{where}/delta",
    )


def _apart(dose: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights of the texts, and each condition's change of their losses."""
    import torch

    apart = {name: torch.tensor(x).double() for name, x in dose.differences.items()}
    return torch.tensor(dose.weights).double(), apart


def _below(
    apart: Mapping[str, Tensor], best: str, control: str, weights: Tensor, doses: Sequence[object]
) -> bool:
    """Whether a dose lowers the loss further than a control, text by text."""
    from melens.intervals import weighted_mean

    found = weighted_mean(apart[best] - apart[control], weights, tests=len(doses)).interval
    return found is not None and found[1] < 0


def answered(
    model: str,
    policy: Policy,
    findings: Sequence[Finding],
    outcomes: Sequence[RuleOutcome],
    stages: Sequence[StageRecord],
) -> tuple[str, str]:
    """The verdict and its sentence."""
    least = None if policy.fail_on == "never" else SEVERITIES.index(policy.fail_on)
    named = [f for f in findings if least is not None and SEVERITIES.index(f.severity) >= least]
    failed = [stage for stage in stages if stage.status == "failed"]
    beside = len(findings) - len(named)
    also = f" {counted(beside, 'remark')} of lesser severity." if beside else ""
    rules = f"the policy '{policy.name}'"
    if named:
        first = named[0]
        text = f"{model} has {counted(len(named), 'finding')} under {rules}; the most severe, "
        text += f"{first.id} ({first.severity}): {first.title}.{also}"
        return "findings", text + _unrun(failed)
    if failed:
        return "incomplete", f"{model} could not be checked in full under {rules}.{_unrun(failed)}"
    passed = sum(rule.status == "passed" and rule.value is not None for rule in outcomes)
    empty = sum(rule.status == "passed" and rule.value is None for rule in outcomes)
    open_ = sum(rule.status == "not measured" for rule in outcomes)
    text = f"{model} is within {rules}: {counted(passed, 'rule', none='no')} passed"
    text += f", {empty} had nothing to measure" if empty else ""
    text += f", {open_} not measured" if open_ else ""
    return "pass", f"{text}, {counted(len(findings), 'remark', none='no')}."


def _unrun(failed: Sequence[StageRecord]) -> str:
    return "".join(f" Stage {stage.name} could not run: {stage.reason}" for stage in failed)
