"""Several measurements in one forward pass."""

from __future__ import annotations

from collections.abc import Mapping

from melens.capture import Reducer, stream
from melens.inputs import Inputs
from melens.measuring.located import Progress


def run_once(inputs: Inputs, *plans: Mapping[str, Reducer], progress: Progress) -> None:
    """One pass over the inputs that feeds the taps of every plan; their hooks must differ."""
    taps = {hook: reducer for plan in plans for hook, reducer in plan.items()}
    stream(inputs.model, inputs.batches, taps, progress=inputs.ticker(progress))
