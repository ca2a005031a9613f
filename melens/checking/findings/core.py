"""What a rule is: one question to the measurements, with one number and one threshold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from melens.errors import ResultError
from melens.provenance import RunInfo
from melens.registry import Registry
from melens.results.base import Result
from melens.results.check import Number

R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class Measured:
    """What rules may look at."""

    results: Mapping[str, Result]
    """Stage -> its result; only what was measured."""
    run: RunInfo
    """Of the check; its settings hold what the model's config says."""
    schemes: tuple[str, ...] = ()
    """Number formats that the policy names."""

    def held(self, name: str, kind: type[R]) -> R:
        """A result that the rule's card says it needs.

        Raises:  ResultError: it is not there, or of another kind.
        """
        found = self.results.get(name)
        if not isinstance(found, kind):
            raise ResultError(f"this rule needs the result '{name}', which is not there.")
        return found


@dataclass(frozen=True)
class Judgement:
    """A rule's answer, whether it found something or not."""

    found: bool
    value: float | None
    """None where there is nothing to measure, e.g. no massive token."""
    source: str | None
    """JSON pointer into the report."""
    title: str = ""
    """What was found, a short sentence without its full stop."""
    evidence: dict[str, Number] = field(default_factory=dict)
    reason: str | None = None
    """Why there is no value, where there is none."""
    advice: str | None = None
    """In place of the card's, where it depends on what was found."""
    why: str | None = None
    """The same of why it matters."""


@dataclass(frozen=True)
class Unmeasured:
    """Why a rule has no answer on this model."""

    reason: str


Judge = Callable[[Measured, float], Judgement | Unmeasured]
"""(measurements, threshold) -> answer."""


@dataclass(frozen=True)
class RuleCard:
    """What is said of a rule whatever it finds."""

    id: str
    looks_for: str
    unit: str
    needs: tuple[str, ...]
    """Stages without which it is not measured."""
    why: str
    """Why it matters to someone who deploys the model."""
    advice: str
    """What to do about it."""
    highest: float | None = None
    """Largest threshold that makes sense: 1 for shares; None = any from 0 on."""


@dataclass(frozen=True)
class Rule:
    """A card and its judge."""

    card: RuleCard
    judge: Judge


RULES: Registry[Rule] = Registry("rule")


def rule(card: RuleCard) -> Callable[[Judge], Judge]:
    """Register a judge under its card's id."""

    def add(judge: Judge) -> Judge:
        RULES.add(card.id, Rule(card, judge))
        return judge

    return add


def nothing(reason: str = "the model has no massive token") -> Judgement:
    """The model lacks what the rule is about, so there is nothing to find."""
    return Judgement(found=False, value=None, source=None, reason=reason)
