"""What a search may try and spend, and how a race divides that among settings and items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from numbers import Real
from typing import TypeVar

from melens.errors import InterventionError
from melens.formatting import brief, counted
from melens.intervals import random_order
from melens.interventions.core import check_number
from melens.interventions.wemask import SELECTS
from melens.results.edit import Edit
from melens.settings import RATES, require_whole

T = TypeVar("T")
ETA = 2
"""Every rung keeps one setting in ETA and gives it ETA times the items."""
FIRST = 5
"""Items of the first rung at least: fewer would throw settings out on one odd text."""
DEFAULT_EVALUATIONS = 2000
CONTROLS = 3
"""Confirmed beside the best: the best random dims of the race, and two controls made from the
best candidate (random dims of its rate, strength and layers; the same edit in other layers)."""


@dataclass(frozen=True)
class Space:
    """Settings of the mask: every combination of selects, layers, rates and strengths."""

    selects: Sequence[str] = ("gamma", "activation", "product", "bottom")
    """Candidates, by their rule for the dimensions."""
    layers: Sequence[str | Sequence[int]] = ("after", "next")
    """``after``, ``next``, or tuples of layers from 0."""
    rates: Sequence[float] = RATES
    strengths: Sequence[float] = (0.25, 0.5, 1.0)
    control_seeds: Sequence[int] = (0,)
    """Random dimensions race as well, one draw a seed, in the same layers, rates and strengths;
    they are only ever controls."""

    def __post_init__(self) -> None:
        """Refuse what could not be tried.

        Raises:  InterventionError: naming the setting and what would fit.
        """
        for name in ("selects", "layers", "rates", "strengths"):
            if isinstance(getattr(self, name), str) or not getattr(self, name):
                raise InterventionError(f"{name} must hold at least one setting to try.")
        if wrong := [s for s in self.selects if s not in SELECTS or s == "random"]:
            fits = ", ".join(s for s in SELECTS if s != "random")
            raise InterventionError(
                f"selects takes {fits}, got {brief(wrong[0], 40)}; random dims are controls, by "
                "control_seeds."
            )
        for name in ("rates", "strengths"):
            for value in getattr(self, name):
                if not 0 < check_number(name, value, low=0.0) <= 1:
                    raise InterventionError(
                        f"{name} must be over 0 and at most 1, got {brief(value, 40)}; 0 changes "
                        "nothing, which is what all are compared with."
                    )
        for layers in self.layers:
            if layers not in ("after", "next") and not (isinstance(layers, tuple) and layers):
                raise InterventionError(
                    f"layers takes 'after', 'next' and tuples of layers from 0, got "
                    f"{brief(layers, 40)}."
                )

    def candidates(self) -> tuple[Edit, ...]:
        """Every setting that may be found best, each once, in a fixed order."""
        return self._edits([(select, 0) for select in self.selects])

    def controls(self) -> tuple[Edit, ...]:
        """The same with random dimensions."""
        return self._edits([("random", seed) for seed in self.control_seeds])

    def _edits(self, rules: list[tuple[str, int]]) -> tuple[Edit, ...]:
        made = [
            Edit.model_validate(
                {
                    "name": "wemask",
                    "select": select,
                    "layers": layers,
                    "rate": float(rate),
                    "strength": float(strength),
                    **({"seed": seed} if select == "random" else {}),
                }
            )
            for (select, seed), layers, rate, strength in product(
                rules, self.layers, self.rates, self.strengths
            )
        ]
        labels = {edit.label: edit for edit in made}
        if len(labels) != len(set(made)):
            raise InterventionError("two settings are alike to six digits; leave one of them out.")
        return tuple(dict.fromkeys(made))


@dataclass(frozen=True)
class Budget:
    """What a search may spend, confirmation included; one of the two.

    An evaluation is one edited setting on one item. The unedited run that all settings of a wave
    start from is not counted.
    """

    evaluations: int | None = None
    seconds: float | None = None
    """Wall time from the first forward pass on. It is turned into evaluations by timing one item
    at the start, and watched between batches."""
    confirm: int = 3
    """Best settings of the race that are held to the held-out items."""
    held_out: float = 0.5
    """Share of the items."""

    def __post_init__(self) -> None:
        """Refuse none, both, or nothing to spend or to confirm."""
        given = [value for value in (self.evaluations, self.seconds) if value is not None]
        numbers = all(isinstance(v, Real) and not isinstance(v, bool) for v in given)  # pyright: ignore[reportUnnecessaryIsInstance]  (a user gives anything)
        if len(given) != 1 or not numbers or not 0 < given[0] < float("inf"):
            raise InterventionError(
                "a budget is evaluations or seconds, one of them and over 0; got "
                f"evaluations={brief(self.evaluations, 40)}, seconds={brief(self.seconds, 40)}."
            )
        require_whole("confirm", self.confirm)


@dataclass(frozen=True)
class Race:
    """How many settings run on how many items: one rung after the other."""

    candidates: int
    controls: int
    rungs: tuple[int, ...]
    """Development items that a setting has seen by the end of each rung; the last is all."""
    keep: int
    """Candidates that no rung goes below: those to be confirmed."""

    def field(self, rung: int) -> tuple[int, int]:
        """Candidates and controls that run in a rung, counted from 0."""
        share = ETA**rung
        return (
            max(min(self.keep, self.candidates), math.ceil(self.candidates / share)),
            math.ceil(self.controls / share),
        )

    @property
    def cost(self) -> int:
        """Evaluations."""
        steps = zip((0, *self.rungs), self.rungs, strict=False)
        return sum(sum(self.field(i)) * (m - before) for i, (before, m) in enumerate(steps))


def rungs_from(first: int, items: int) -> tuple[int, ...]:
    """``first`` items, then ETA times as many, up to all."""
    made = [min(first, items)]
    while made[-1] < items:
        made.append(min(made[-1] * ETA, items))
    return tuple(made)


def race_of(space: Space, items: int, budget: int, keep: int, *, reserved: int = 0) -> Race:
    """The race that a budget of evaluations pays for, ``reserved`` of them put aside.

    All settings start if they can; what is left over lets them see more items before the first
    cut. If they cannot, as many start as the budget carries, candidates and controls in proportion.

    Raises:  InterventionError: too small for ``keep`` candidates and one control.
    """
    candidates, controls = len(space.candidates()), len(space.controls())
    whole = [
        Race(candidates, controls, rungs_from(first, items), keep)
        for first in range(items, min(FIRST, items) - 1, -1)
    ]
    left = budget - reserved
    if fits := [race for race in whole if race.cost <= left]:
        return fits[0]
    smaller = [
        Race(n, math.ceil(n * controls / candidates), whole[-1].rungs, keep)
        for n in range(candidates - 1, min(keep, candidates - 1) - 1, -1)
        if n
    ]
    if fits := [race for race in smaller if race.cost <= left]:
        return fits[0]
    least = (smaller or whole)[-1].cost
    raise InterventionError(
        f"a budget of {counted(budget, 'evaluation')} is too small: the race over {items} "
        f"development items needs at least {least}, and the confirmation {reserved}. Give at least "
        f"{least + reserved}, fewer items or fewer to confirm."
    )


def drawn(settings: Sequence[T], count: int, seed: int) -> list[T]:
    """``count`` of the settings, at random, in their own order."""
    order = random_order(len(settings), seed=seed).tolist()
    chosen = set(order[:count])
    return [setting for i, setting in enumerate(settings) if i in chosen]
