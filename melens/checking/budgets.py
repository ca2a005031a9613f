"""Which stages a check has, in order: what each costs, and when there is nothing to do in it."""

from __future__ import annotations

from dataclasses import dataclass

from melens.registry import Registry
from melens.results.check import Budget
from melens.results.locate import MELayer

BUDGETS: tuple[Budget, ...] = ("quick", "standard", "full")
"""From the cheapest; each holds all stages of those before it."""


@dataclass(frozen=True)
class CheckStage:
    """One measurement of a check."""

    name: str
    budget: Budget
    """The least that runs it."""
    work: float
    """Expected share of time beside the others: seconds on SmolLM2-135M, two cores, 8 x 128."""
    token: bool = False
    """Whether there is nothing to measure without a block in which a token becomes massive."""

    def unneeded(self, located: MELayer) -> str | None:
        """Why this stage has nothing to do on a model; None where it has."""
        if not self.token or (located.me_layer is not None and located.me_layer >= 0):
            return None
        what = "has no massive token" if located.me_layer is None else "has it in its embedding"
        return f"the model {what}, so there is nothing to measure"


STAGES: Registry[CheckStage] = Registry("stage")
for _stage in (
    CheckStage("locate", "quick", 4.0),
    CheckStage("known", "quick", 0.1),
    CheckStage("describe", "quick", 2.0),
    CheckStage("collapse", "quick", 17.0),
    CheckStage("sinks", "quick", 8.0),
    CheckStage("cache_norms", "quick", 8.0, token=True),
    CheckStage("attention", "quick", 2.0),
    CheckStage("isolate", "standard", 130.0, token=True),
    CheckStage("super_weights", "standard", 40.0),
    CheckStage("quantise", "standard", 60.0),
    CheckStage("edits", "standard", 16.0, token=True),
    CheckStage("eviction", "standard", 6.0, token=True),
    CheckStage("dose", "full", 50.0, token=True),
):
    STAGES.add(_stage.name, _stage)


def stages_of(budget: str) -> tuple[CheckStage, ...]:
    """What a budget runs, in order.

    Raises:  UnknownNameError: no such budget.
    """
    known_budgets: Registry[int] = Registry("budget")
    for i, name in enumerate(BUDGETS):
        known_budgets.add(name, i)
    most = known_budgets[budget]
    return tuple(stage for stage in STAGES.values() if known_budgets[stage.budget] <= most)
