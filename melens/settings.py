"""The settings that calls share: what is run on, what is compared, and how it is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from melens.errors import InterventionError

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""
RATES = (0.1, 0.25, 0.5, 0.75, 0.9)
STRENGTHS = (0.25, 0.5, 0.75)
CONTROL_SEEDS = (0, 1, 2)


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
        """Refuse sizes below 1."""
        for name in ("batch_tokens", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InterventionError(f"{name} must be at least 1, got {value}.")
