"""diff(): two sides -> one frozen Difference, and how far numbers may lie apart and be the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from melens.comparing import rows
from melens.comparing.rows import Tolerances
from melens.comparing.sides import Side, texts_like, two_sides
from melens.protocols import ModelLike
from melens.provenance import ModelFacts, RunInfo
from melens.results.base import Result
from melens.results.diff import Difference

if TYPE_CHECKING:
    from melens.inputs import Source

BASE = Tolerances()


def diff(
    a: ModelLike | Result | Side,
    b: ModelLike | Result | Side,
    prompts: Source = None,
    *,
    any_texts: bool = False,
    tolerances: Tolerances = BASE,
    progress: Callable[[int, int], None] | None = None,
) -> Difference:
    """Say whether the massive activation of ``b`` is that of ``a``: layer, token, size, direction.

    For a fine-tuned, quantised or converted model against its base. Layers count from 0, at the
    block output.

    Args:    a, b: anything ``melens.load`` takes, a saved locate.json or report.json (its path, or
             the result), or a :class:`Side`. Named models are held one at a time.
             prompts: texts for those that are models; None = the bundled ones, cut as those of
             the saved one, if there is one.
             any_texts: compare saved results of other texts too, with a note.
             progress: called with (rows done, rows in all), once a model.
    Raises:  ResultError: a saved file of another kind, or of other texts.
             What ``melens.locate`` raises, for models.
    """

    def measure(index: int, texts: Source, like: Side | None) -> Side:
        model = (a, b)[index]
        assert not isinstance(model, (Result, Side))  # those are read
        return Side.of_model(model, texts, like=like, progress=progress)

    sides = two_sides(
        (a, b),
        lambda saved: texts_like(saved) if prompts is None else prompts,
        measure,
        any_texts=any_texts,
    )
    return compare(sides[0], sides[1], tolerances)


def compare(a: Side, b: Side, tolerances: Tolerances = BASE) -> Difference:
    """Put one result together from two sides, whatever their texts."""
    profile = rows.profile_rows(a, b)
    deep = "" if a.located.n_layers == b.located.n_layers else rows.OTHER_DEPTH
    made = [
        *rows.layer_rows(a.located, b.located),
        *rows.token_rows(a.located, b.located, tolerances),
        *rows.direction_rows(a, b, tolerances),
        *rows.profile_change(profile, tolerances, why_not=deep),
        *rows.shape_rows(a, b),
        *rows.report_rows(a.report, b.report, tolerances),
    ]
    return Difference(
        verdict="changed" if any(row.changed for row in made) else "same",
        a=a.info(),
        b=b.info(),
        changes=tuple(made),
        profile=profile,
        cannot=tuple(_cannot(a, b)),
        notes=tuple(_notes(a, b)),
        run=_run(a, b, tolerances),
    )


def _cannot(a: Side, b: Side) -> list[str]:
    """What was left out, and why."""
    made = []
    if a.located.n_layers != b.located.n_layers:
        made.append(
            f"layers by number: {a.located.n_layers} against {b.located.n_layers} layers, so layer "
            "numbers are shown and not judged"
        )
    if a.width is None or b.width is None:
        made.append("d_model, vocabulary and direction: a saved result does not hold them")
    elif a.width[0] != b.width[0]:
        made.append(f"direction: d_model {a.width[0]} against {b.width[0]}")
    if not a.located.massive and not b.located.massive:
        made.append(
            "token, dimension, value and direction: neither has a massive token, so only shapes "
            "and each layer's largest |x| were compared"
        )
    elif not a.located.massive or not b.located.massive:
        made.append("token, dimension and value: not both have a massive token")
    if (a.report is None) != (b.report is None):
        made.append("sinks and findings: only one of the two is a report")
    return made


def _notes(a: Side, b: Side) -> list[str]:
    made = []
    first, second = a.located.run, b.located.run
    if first.settings.get("ids") != second.settings.get("ids"):
        made.append(
            "measured on other tokens (another text, or another tokenizer): sizes differ for that "
            "reason alone"
        )
    if first.weights is not None and first.weights == second.weights:
        made.append("both have the same weights (by a sample of every tensor)")
    elif first.weights is not None and second.weights is not None:
        made.append(_other_weights(first.dtype, second.dtype))
    if a.family and b.family and a.family != b.family:
        made.append(f"two families: {a.family} and {b.family}")
    if first.dtype != second.dtype:
        made.append(f"computed in {first.dtype} and in {second.dtype}")
    return made


def _other_weights(first: str, second: str) -> str:
    """What two hashes say that are not the same: a dtype of its own makes another one."""
    if first == second:
        return "the weights differ (by a sample of every tensor)"
    return (
        f"whether the weights differ is not known: they were read in {first} and in {second}, and "
        "hashes of two dtypes cannot be compared"
    )


def _run(a: Side, b: Side, tolerances: Tolerances) -> RunInfo:
    first, second = a.located.run, b.located.run
    facts = ModelFacts(
        name=f"{first.model} against {second.model}",
        revision=None,
        weights=None,
        dtype=_both(first.dtype, second.dtype),
        device=_both(first.device, second.device),
    )
    bounds = {name: str(value) for name, value in vars(tolerances).items()}
    same = first.settings.get("ids") == second.settings.get("ids")
    return RunInfo.collect(facts, seed=first.seed, settings={**bounds, "same_texts": same})


def _both(first: str, second: str) -> str:
    return first if first == second else f"{first}, {second}"
