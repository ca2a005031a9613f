"""The settings that calls share: what is run on, what is compared, and how it is run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TypeVar

from melens.errors import InterventionError, MelensError
from melens.formatting import brief

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""
RATES = (0.1, 0.25, 0.5, 0.75, 0.9)
STRENGTHS = (0.25, 0.5, 0.75)
CONTROL_SEEDS = (0, 1, 2)
LARGEST = 2**63
"""Whole numbers of a setting are below it: they have 64 bits."""


@dataclass(frozen=True)
class Items:
    """What is run on: where a task's items come from."""

    data: Path | None = None
    """A file, or a folder that holds the task's own file; None = what is bundled, if anything."""
    n: int | None = None
    """How many; None = the task's own number."""
    length: int = 128
    """Tokens an item at most, where the task cuts texts."""
    bos: bool | None = None
    """None = as the tokenizer does."""
    chat: bool | None = None
    """None = the chat template where the task asks a question and the tokenizer has one."""

    def __post_init__(self) -> None:
        """Refuse what is no path, number or switch."""
        if self.data is not None:
            object.__setattr__(self, "data", require_path("data", self.data))
        require_whole("n", self.n, or_none=True)
        require_whole("length", self.length)
        for name in ("bos", "chat"):
            if getattr(self, name) not in (None, True, False):
                raise InterventionError(
                    f"{name} must be True, False or None, got {brief(getattr(self, name), 40)}."
                )


@dataclass(frozen=True)
class Compare:
    """What stands beside base and edit; doses and both controls unless told otherwise."""

    rates: tuple[float, ...] = RATES
    """Doses of a mask; an edit without a rate takes ``strengths``."""
    strengths: tuple[float, ...] = STRENGTHS
    seeds: tuple[int, ...] = CONTROL_SEEDS
    """Of the random dimensions."""
    rivals: tuple[str, ...] = ()
    """Other edits, by name, at full strength."""

    def __post_init__(self) -> None:
        """Refuse what is no list of doses, seeds or names."""
        for name in ("rates", "strengths", "seeds", "rivals"):
            given = getattr(self, name)
            if isinstance(given, str) or not isinstance(given, Sequence):
                raise InterventionError(
                    f"{name} must be a list, () for none, got {brief(given, 40)}."
                )
            object.__setattr__(self, name, tuple(given))
        for dose in (*self.rates, *self.strengths):
            if isinstance(dose, (bool, str)) or not 0 <= dose <= 1:
                raise InterventionError(f"a dose must be from 0 to 1, got {brief(dose, 40)}.")
        for seed in self.seeds:
            require_whole("a seed", seed, least=0)


@dataclass(frozen=True)
class Run:
    """How it is run; a call takes of it what it has."""

    seed: int = 0
    """Of the bootstrap, and of whatever is drawn."""
    batch_tokens: int = 1024
    """Tokens a forward pass, padding included, where the answer is given; a longer item runs
    alone."""
    batch_size: int = 1
    """Answers at a time, where they are generated."""
    max_new_tokens: int | None = None
    """Limit of a generated answer; None = the task's own."""
    keep: Path | None = None
    """JSON-lines file of all that is finished; an interrupted run goes on from it."""
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Refuse sizes below 1, and a file that is no path."""
        require_whole("seed", self.seed, least=0)
        for name in ("batch_tokens", "batch_size"):
            require_whole(name, getattr(self, name))
        require_whole("max_new_tokens", self.max_new_tokens, or_none=True)
        if self.keep is not None:
            object.__setattr__(self, "keep", require_path("keep", self.keep))


Setting = TypeVar("Setting", Items, Compare, Run)


def setting_of(given: Setting | None, kind: type[Setting], name: str) -> Setting:
    """What a call was given, or the default of its kind.

    Raises:  InterventionError: it is of another kind.
    """
    if given is None:
        return kind()
    if not isinstance(given, kind):
        raise InterventionError(
            f"{name} must be a melens.evaluating.{kind.__name__}, got {brief(given, 40)}."
        )
    return given


def require_whole(
    name: str,
    value: object,
    *,
    least: int = 1,
    or_none: bool = False,
    error: type[MelensError] = InterventionError,
) -> None:
    """Refuse what is not a whole number, or one that is too small or needs more than 64 bits.

    Raises:  ``error``: naming the setting and what was given.
    """
    if value is None and or_none:
        return
    whole = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if whole is None or not least <= whole < LARGEST:
        bound = f", at least {least}" if least > -LARGEST else ""
        raise error(f"{name} must be a whole number{bound}, got {brief(value, 40)}.")


def require_seed(seed: object) -> None:
    """Refuse what is not a seed: torch takes Python's own whole numbers of 64 bits.

    Raises:  InterventionError: with what was given.
    """
    if not isinstance(seed, int):
        raise InterventionError(f"seed must be a whole number from 0 on, got {brief(seed, 40)}.")
    require_whole("seed", seed, least=0)


def require_path(name: str, value: object) -> Path:
    """A path as one; refuses what is none, and an empty text, which would be this folder.

    Raises:  InterventionError: naming the setting and what was given.
    """
    if not isinstance(value, (str, os.PathLike)) or value == "":
        raise InterventionError(f"{name} must be a path, got {brief(value, 40)}.")
    return Path(value)
