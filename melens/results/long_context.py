"""LongContext: what is found in long texts, and how well they are foreseen, with an edit or not.

Found is exact: every token of the answer was the likeliest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from melens.formatting import with_interval
from melens.protocols import JsonObject
from melens.provenance import RunInfo
from melens.results.base import Part, Result
from melens.results.edit import Edit
from melens.results.evaluation import Delta, Role, Score


class Retrieval(Part):
    """Items of one condition; intervals are over items."""

    n: int
    found: Score
    """Share of the items whose answer is exact, 0 to 1."""
    loss: Score
    """Mean loss of the answers' tokens, nats a token."""
    found_delta: Delta | None
    """Against the same items without an edit; None for the base."""
    loss_delta: Delta | None


class LengthRetrieval(Retrieval):
    """The items of one length, all depths together."""

    length: int


class LengthCell(Part):
    """The items of one length and depth."""

    length: int
    """Tokens, question and answer included."""
    depth: float
    """0 = before the text, 1 = after it."""
    n: int
    found: int
    """Items whose answer is exact."""
    loss: float
    """Of the answers' tokens, nats a token."""


class PositionBin(Part):
    """Tokens of the plain texts at positions ``start`` to ``stop - 1``; intervals over texts."""

    start: int
    stop: int
    tokens: int
    """Scored ones, all texts together."""
    loss: Score
    delta: Delta | None


class LongCondition(Part):
    """Everything under one edit."""

    name: str
    role: Role
    edit: Edit
    overall: Retrieval
    by_length: tuple[LengthRetrieval, ...]
    cells: tuple[LengthCell, ...]
    """Lengths outermost, then depths."""
    text_loss: Score | None
    """Mean over all scored tokens of the plain texts; None where none were run."""
    text_delta: Delta | None
    bins: tuple[PositionBin, ...]
    """Positions from 1 on; empty where no plain texts were run."""
    energy: float | None = None
    """Masked share of the token's squared norm at the attention input, 0 to 1; masks only."""

    def cell(self, length: int, depth: float) -> LengthCell:
        """The cell of a length and depth.

        Raises:  KeyError: there is none.
        """
        for cell in self.cells:
            if (cell.length, cell.depth) == (length, depth):
                return cell
        raise KeyError((length, depth))


class LongContext(Result):
    """Retrieval over length x depth and loss by position, with an edit and without."""

    schema_id: ClassVar[str] = "melens/long-context/1"

    kind: Literal["long-context"] = "long-context"
    schema_: Literal["melens/long-context/1"] = Field(
        default="melens/long-context/1", alias="schema"
    )
    task: Literal["passkey", "needles"]
    needles: int
    """Hidden in an item; one of them is asked for."""
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    seeds: int
    """Items a cell."""
    n: int
    edit: Edit
    me_layer: int | None
    """From 0, at the block output."""
    base: LongCondition
    edited: LongCondition
    dose: tuple[LongCondition, ...]
    controls: tuple[LongCondition, ...]
    rivals: tuple[LongCondition, ...]
    texts: int
    """Plain texts of the loss by position."""
    text_length: int | None
    items: str | None
    """Name of the file beside this one with every item's prompt, answer and scores."""
    about: str
    """Plain words: what is measured, on what, and how items were made."""
    run: RunInfo

    @model_validator(mode="after")
    def _fits_together(self) -> LongContext:
        """Refuse what no run can have made."""
        grid = list(product(self.lengths, self.depths))
        if not grid or self.n != len(grid) * self.seeds:
            raise ValueError("n must be lengths x depths x seeds")
        if self.base.role != "base" or self.edited.edit != self.edit:
            raise ValueError("base and edited must come first, and edited be the edit")
        for c in self.conditions:
            if [(cell.length, cell.depth) for cell in c.cells] != grid or any(
                cell.n != self.seeds or not 0 <= cell.found <= cell.n for cell in c.cells
            ):
                raise ValueError(f"{c.name} must have one cell a length and depth, of seeds items")
            if tuple(part.length for part in c.by_length) != self.lengths:
                raise ValueError(f"{c.name} must have one part a length")
            exact = sum(cell.found for cell in c.cells)
            if abs(exact - c.overall.found.value * self.n) > 1e-6 * self.n:
                raise ValueError(f"{c.name}: found must be what its cells hold")
            if bool(c.bins) != bool(self.texts) or (c.text_loss is None) == bool(self.texts):
                raise ValueError(f"{c.name} must have bins where texts were run, and only there")
            _check_deltas(c, self.base)
        return self

    @property
    def conditions(self) -> tuple[LongCondition, ...]:
        """All of them, base first."""
        return (self.base, self.edited, *self.dose, *self.controls, *self.rivals)

    def rows(self) -> list[JsonObject]:
        """One row a condition, length and depth."""
        return [
            {
                "condition": c.name,
                "role": c.role,
                "edit": c.edit.label,
                "length": cell.length,
                "depth": cell.depth,
                "n": cell.n,
                "found": cell.found / cell.n,
                "loss": cell.loss,
            }
            for c in self.conditions
            for cell in c.cells
        ]

    def grids(self) -> dict[str, list[list[list[float]]]]:
        """``found`` (shares) and ``loss`` (nats a token): (conditions, lengths, depths)."""
        where = [[(n, depth) for depth in self.depths] for n in self.lengths]
        cells = [[[c.cell(*at) for at in row] for row in where] for c in self.conditions]
        return {
            "found": [[[cell.found / cell.n for cell in row] for row in c] for c in cells],
            "loss": [[[cell.loss for cell in row] for row in c] for c in cells],
        }

    def shown(self) -> list[JsonObject]:
        """One row a condition."""
        return [
            {
                "condition": c.name,
                "role": c.role,
                "edit": c.edit.label,
                "found": c.overall.found.value,
                "answer loss": c.overall.loss.value,
                "text loss": c.text_loss and c.text_loss.value,
                "energy": c.energy,
            }
            for c in self.conditions
        ]

    def summary(self) -> str:
        """Plain sentences; says when the edit does not help, and what the controls do."""
        lengths = f"{min(self.lengths)}" + f"-{max(self.lengths)}" * (len(self.lengths) > 1)
        before, after = self.base.overall, self.edited.overall
        text = (
            f"{self.run.subject}, {self.task}, {self.n} items of {lengths} tokens: "
            f"{before.found.value:.1%} found without, {after.found.value:.1%} with "
            f"{self.edit.label}"
        )
        if self.edited.energy is not None:
            text += f" ({self.edited.energy:.0%} of the token's energy masked)"
        text += f"; difference {self._against('found', higher=True)}"
        text += (
            f" Loss of the answers: {before.loss.value:.4g} nats a token without, difference "
            f"{self._against('loss', higher=False)}"
        )
        if self.base.text_loss is not None:
            text += (
                f" Loss of {self.texts} plain texts of {self.text_length} tokens: "
                f"{self.base.text_loss.value:.4g} without, difference "
                f"{self._against('text', higher=False)}"
            )
        tried = len(self.conditions) - 1
        return f"{text} {tried} edits tried, not corrected for. Layers count from 0."

    def _against(self, what: str, *, higher: bool) -> str:
        """The edit's difference with its verdict, and those of the controls."""
        delta = delta_of(self.edited, what)
        assert delta is not None
        others = [(c.name, delta_of(c, what)) for c in self.controls]
        said = _verdict(delta, [(n, d) for n, d in others if d is not None], higher=higher)
        text = f"{_shown(delta)}, {said}."
        if others:
            text += " Controls: "
            text += "; ".join(f"{name} {_shown(d)}" for name, d in others if d is not None)
            text += "."
        return text


def delta_of(condition: LongCondition, what: str) -> Delta | None:
    """A condition's difference to the base in ``found``, ``loss`` or ``text``."""
    if what == "text":
        return condition.text_delta
    return condition.overall.found_delta if what == "found" else condition.overall.loss_delta


def _shown(delta: Delta) -> str:
    return with_interval(delta.value, delta.interval, "+.3g")


def _verdict(delta: Delta, controls: Sequence[tuple[str, Delta]], *, higher: bool) -> str:
    """Helped or not, by the paired interval, and whether a control does as much."""
    if delta.interval is None:
        return "no item differs" if not delta.value else "too few or equal items to say more"
    if delta.interval[0] <= 0 <= delta.interval[1]:
        return "not told apart from no edit"
    sign = 1 if delta.value > 0 else -1
    said = "it helps" if (sign > 0) == higher else "it harms"
    same = [name for name, other in controls if sign * other.value >= abs(delta.value)]
    return f"{said}, but a control does as much ({', '.join(same)})" if same else said


def _check_deltas(condition: LongCondition, base: LongCondition) -> None:
    """Differences are there for edits alone, and are what the values say."""
    pairs = [
        (score, reference, delta)
        for part, other in zip(
            (condition.overall, *condition.by_length), (base.overall, *base.by_length), strict=True
        )
        for score, reference, delta in (
            (part.found, other.found, part.found_delta),
            (part.loss, other.loss, part.loss_delta),
        )
    ]
    if condition.text_loss is not None and base.text_loss is not None:
        pairs.append((condition.text_loss, base.text_loss, condition.text_delta))
        if [(b.start, b.stop) for b in condition.bins] != [(b.start, b.stop) for b in base.bins]:
            raise ValueError(f"{condition.name} must have the bins of the base")
        pairs += [
            (mine.loss, other.loss, mine.delta)
            for mine, other in zip(condition.bins, base.bins, strict=True)
        ]
    for score, reference, delta in pairs:
        if (delta is None) != (condition.role == "base"):
            raise ValueError("every edited condition needs its differences, and the base none")
        apart = 0.0 if delta is None else score.value - reference.value - delta.value
        if abs(apart) > 1e-6 * max(1.0, abs(score.value), abs(reference.value)):
            raise ValueError(f"the differences of {condition.name} must be its values - the base's")
