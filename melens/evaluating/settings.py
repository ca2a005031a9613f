"""How an evaluation is run, and what it runs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from melens.evaluating.conditions import Condition, Plan, located_facts
from melens.inputs import Inputs
from melens.results import MELayer

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """How an evaluation is run."""

    plan: Plan = field(default_factory=Plan)
    seed: int = 0
    """Of the bootstrap."""
    batch_tokens: int = 1024
    """Tokens a forward pass, padding included; where the answer is given."""
    batch_size: int = 1
    """Answers at a time, where they are generated."""
    max_new_tokens: int | None = None
    """Limit of a generated answer; None = the task's own."""
    items: Path | None = None
    """JSON-lines file of every item's scores; an interrupted run goes on from it."""


@dataclass(frozen=True)
class Card:
    """What a task is, to be said in the result."""

    name: str
    unit: str
    higher_is_better: bool
    about: str
    facts: dict[str, Any] = field(default_factory=dict)
    """Goes into the run's settings."""


@dataclass(frozen=True)
class Bench:
    """A model and all that it is tried under."""

    inputs: Inputs
    """The model and the fingerprint of its weights; no batches."""
    conditions: tuple[Condition, ...]
    me_layer: MELayer
    settings: Settings

    @property
    def model(self) -> Any:
        """The bridge."""
        return self.inputs.model

    def facts(self, **more: Any) -> dict[str, Any]:
        """What every number depends on, with what the kind of task adds."""
        return {
            **self.inputs.facts(),
            "conditions": [[c.name, c.edit.model_dump(mode="json")] for c in self.conditions],
            "located": located_facts(self.me_layer), **more,
        }  # fmt: skip
