"""What is changed in a run, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from melens.interventions.tokens import Choice


@dataclass(frozen=True)
class LayerEdit:
    """An intervention of one layer, by a name that says all of it on one model and set of texts."""

    name: str
    enter: Callable[[Any, Choice], AbstractContextManager[None]]
    """(model, tokens) -> ready to be entered."""


@dataclass(frozen=True)
class Change:
    """Edits of one layer, entered together; none = the model as it is."""

    layer: int
    edits: tuple[LayerEdit, ...] = ()

    @property
    def name(self) -> str:
        """Of all its edits."""
        return " and ".join(edit.name for edit in self.edits) or "clean"


@dataclass(frozen=True)
class Outcome:
    """One change's effect, ``[sequence]`` each; the coordinate is NaN without a massive token."""

    coordinate: Float[Tensor, " sequence"]
    sink_rate: Float[Tensor, " sequence"]
    loss: Float[Tensor, " sequence"]
