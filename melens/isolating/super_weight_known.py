"""Super weights held against published coordinates, which ship with melens."""

from __future__ import annotations

from typing import Literal

from melens.errors import ResultError
from melens.knowledge import known_models, published_rows
from melens.results.known import Comparison, KnownCheck
from melens.results.super_weights import SuperWeights

CONVENTION = (
    "(layer, row, column): 0-based block, row = residual dimension, column = neuron, as in the "
    "checkpoint's down_proj.weight[row, column]."
)


def check_known(model: str) -> None:
    """Refuse a name without published super weights.

    Raises:  ResultError: naming those that have them.
    """
    if not any(row.get("super_weights") for row in published_rows(model)):
        names = [
            name
            for name, rows in known_models().items()
            if any(row.get("super_weights") for row in rows)
        ]
        raise ResultError(
            f"no super weights of {model!r} are on record; known: {', '.join(names)}."
        )


def hold_super_weights(model: str, result: SuperWeights) -> KnownCheck:
    """Hold found super weights against the published coordinates of ``model``.

    Args:    model: a row's name (``org/name``, or its last part, or a named model).
    Returns: a published coordinate that was found is a ``match``, one that was not a ``mismatch``,
             and a found one that is not on record ``unknown``; ``unknown`` as a whole where no
             coordinates are on record.
    """  # fmt: skip
    rows = [row for row in published_rows(model) if row.get("super_weights")]
    if not rows:
        return KnownCheck(
            model=model, verdict="unknown", comparisons=(), source=None, convention=CONVENTION
        )
    published = [tuple(at) for row in rows for at in row["super_weights"]]
    found = {weight.at: f"found in pass {weight.found_in}" for weight in result.super_weights}
    made = [
        _compare(at, "yes", found.get(at, "not found"), "match" if at in found else "mismatch")
        for at in dict.fromkeys(published)
    ]
    made += [
        _compare(at, "not on record", found[at], "unknown") for at in found if at not in published
    ]
    missed = any(row.verdict == "mismatch" for row in made)
    return KnownCheck(
        model=model,
        verdict="mismatch" if missed else "match",
        comparisons=tuple(made),
        source="; ".join(dict.fromkeys(row["source"] for row in rows)),
        convention=CONVENTION,
    )


def with_known(result: SuperWeights, model: str) -> SuperWeights:
    """The same result with that comparison in it."""
    return result.model_copy(update={"known": hold_super_weights(model, result)})


def _compare(
    at: tuple[int, ...],
    published: str,
    measured: str,
    verdict: Literal["match", "mismatch", "unknown"],
) -> Comparison:
    return Comparison(
        what=f"super weight {at}", published=published, measured=measured, verdict=verdict
    )
