"""Rewards of GRPO: the strict scorer of answers, or a function of the user's own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import cast

from melens.errors import InterventionError
from melens.evaluating.scoring import extract_answer, same_answer
from melens.formatting import brief
from melens.models.complaints import first_line

Reward = Callable[..., Sequence[float]]
MATH = "math"
MARK = "####"
"""What GSM8K writes before the final number."""


def reward_of(name: str) -> Reward:
    """The function that a name stands for.

    Args:    name: ``math``, or ``module:function``.
    Raises:  InterventionError: it cannot be imported, or is no function.
    """
    if name == MATH:
        return math_reward
    module, _, function = name.partition(":")
    if not module or not function:
        raise InterventionError(
            f"reward must be {MATH} or module:function, e.g. rewards:short, got {brief(name, 60)}."
        )
    here = str(Path.cwd())
    try:
        sys.path.insert(0, here)  # a script of the user's own stands where the command is typed
        found: object = getattr(import_module(module), function, None)
    except Exception as error:  # whatever the user's module raises
        raise InterventionError(
            f"cannot import {brief(module, 60)} ({type(error).__name__}: {first_line(error)})."
        ) from None
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise InterventionError(f"{module} has no function {brief(function, 60)}.")
    return cast("Reward", found)


def math_reward(
    completions: Sequence[str | Sequence[Mapping[str, str]]], answer: Sequence[str], **rest: object
) -> list[float]:
    """1 where the answer's final value is the row's, else 0; an answer without one counts as wrong.

    Args:    completions: texts, or conversations of one turn, as TRL hands them over.
             answer: of the row; of GSM8K what stands after ``####``.
    """
    texts = [made if isinstance(made, str) else made[-1]["content"] for made in completions]
    golds = [gold.rpartition(MARK)[2].strip() for gold in answer]
    return [
        float(same_answer(extract_answer(text), gold))
        for text, gold in zip(texts, golds, strict=True)
    ]
