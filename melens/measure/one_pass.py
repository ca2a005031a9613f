"""Several measurements in one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from melens.capture import Reducer, stream
from melens.inputs import Inputs
from melens.measure.located import Progress


class Plan(Protocol):
    """Taps of one measurement."""

    @property
    def taps(self) -> Mapping[str, Reducer]:
        """Hook -> reducer."""
        ...


def run_plans(inputs: Inputs, plans: Sequence[Plan], progress: Progress) -> None:
    """One pass over the inputs that feeds every plan; their hooks must differ."""
    taps = {hook: reducer for plan in plans for hook, reducer in plan.taps.items()}
    stream(inputs.model, inputs.batches, taps, progress=inputs.ticker(progress))
