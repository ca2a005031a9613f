"""WeightEdit: one change of stored weights; Baked: the changes that saved weights hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from melens.errors import InterventionError, ResultError
from melens.formatting import brief
from melens.results.base import Part, added_later
from melens.store import RESULT, read_text

Change = Literal["weight", "neuron", "gain", "expert", "transplant"]
Index = Annotated[int, Field(ge=0)]
FORMS: dict[Change, tuple[str, ...]] = {
    "weight": ("layer", "dim", "neuron", "factor"),
    "neuron": ("layer", "neuron", "factor"),
    "gain": ("layer", "norm", "dim", "factor"),
    "expert": ("layer", "expert"),
    "transplant": ("layer", "donor_layer"),
}
"""What a change is written with as text, in this order; a factor may be left out."""
MORE: dict[Change, tuple[str, ...]] = {
    "weight": ("expert",),
    "neuron": ("expert",),
    "gain": (),
    "expert": (),
    "transplant": ("donor", "parts"),
}
"""What JSON may say beside that."""


def _said(change: Change) -> str:
    names = [name.replace("_", "-").upper() for name in FORMS[change]]
    return f"{change}:" + ",".join(names).replace(",FACTOR", "[,FACTOR]")


FORM = ", ".join(map(_said, FORMS))


class WeightEdit(Part):
    """One change of stored weights: it acts at every token, in whatever loads them.

    weight: one entry of the down projection times ``factor`` (a super weight). neuron: one FFN
    neuron's output times ``factor``. gain: one dimension of a norm's gain times ``factor``. expert:
    one routed expert writes nothing. transplant: the FFN, and the norm before it, of another layer.
    """

    change: Change
    layer: Index
    """From 0."""
    dim: Index | None = added_later(None)
    """A residual dimension: row of the down projection, or of a norm."""
    neuron: Index | None = added_later(None)
    """Column of the down projection."""
    expert: Index | None = added_later(None)
    """A routed expert, whose weights and neurons can be set to zero alone."""
    norm: Literal["ln1", "ln1_post", "ln2", "ln2_post"] | None = added_later(None)
    factor: float = added_later(0.0)
    donor_layer: Index | None = added_later(None)
    donor: str | None = added_later(None)
    """Name or folder of another model of the same sizes; None = the model itself."""
    parts: tuple[Literal["norm", "ffn"], ...] = added_later(("norm", "ffn"))
    """What a transplant takes."""

    @model_validator(mode="after")
    def _means_something(self) -> WeightEdit:
        """Refuse settings that the change does not have, lacks, or that change nothing."""
        given = self.model_fields_set - {"change"}
        needed = set(FORMS[self.change]) - {"factor"}
        if foreign := given - {*FORMS[self.change], *MORE[self.change]}:
            raise ValueError(f"{self.change} has no {', '.join(sorted(foreign))}")
        if missing := sorted(n for n in needed if getattr(self, n) is None):
            raise ValueError(f"{self.change} needs {', '.join(missing)}: {_said(self.change)}")
        if self.factor == 1:
            raise ValueError("factor 1 changes nothing")
        if self.expert is not None and self.factor != 0:
            raise ValueError("an expert's weights can be set to zero alone (factor 0)")
        if self.change == "transplant" and not self.parts:
            raise ValueError("parts must be norm, ffn or both")
        if self.change == "transplant" and (self.donor, self.donor_layer) == (None, self.layer):
            raise ValueError("a layer's own parts in its own place change nothing")
        return self

    @property
    def place(self) -> tuple[object, ...]:
        """What is changed, whatever it is changed to."""
        return self.change, self.layer, self.expert, self.norm, self.dim, self.neuron

    @property
    def label(self) -> str:
        """In words."""
        at = "" if self.expert is None else f" of expert {self.expert}"
        what = {
            "weight": f"down projection [{self.dim}, {self.neuron}]{at}",
            "neuron": f"neuron {self.neuron}{at}",
            "gain": f"gain of {self.norm} in dimension {self.dim}",
            "expert": f"expert {self.expert} writes nothing",
            "transplant": f"{' and '.join(self.parts)} of layer {self.donor_layer}"
            + (f" of {self.donor}" if self.donor else ""),
        }[self.change]
        scaled = f" x {self.factor:g}" if "factor" in FORMS[self.change] else ""
        return f"layer {self.layer}: {what}{scaled}"


class Baked(Part):
    """What was written into a model's weights at one time."""

    edits: tuple[WeightEdit, ...] = Field(min_length=1)
    model: str
    weights: str
    """Hash of the weights before."""
    dtype: str
    tensors: tuple[str, ...]
    """Names of the parameters that were changed."""
    logit_change: float
    """Largest change of a logit by the edits, on a few tokens."""
    logit_difference: float
    """Largest difference on them from the edits as melens enters them on the running model."""


BAKED = "melens_baked"
"""The field of a model's config that keeps it, as a list: the oldest first."""
_HISTORY: TypeAdapter[tuple[Baked, ...]] = TypeAdapter(tuple[Baked, ...])
_EDITS: TypeAdapter[tuple[WeightEdit, ...]] = TypeAdapter(tuple[WeightEdit, ...])


def baked_in(config: object) -> tuple[Baked, ...]:
    """What a transformers config says was written into the weights.

    Raises:  ResultError: the field is not what melens writes.
    """
    return baked_history(getattr(config, BAKED, None) or (), f"{BAKED} in the model's config.json")


def baked_history(found: object, where: str) -> tuple[Baked, ...]:
    """The same of a list, or of its JSON text.

    Raises:  ResultError: it is not what melens writes.
    """
    try:
        if isinstance(found, str):
            return _HISTORY.validate_json(found)
        return _HISTORY.validate_python(found)
    except ValidationError as error:
        raise ResultError(
            f"{where} is not what melens writes ({_first(error)}); remove it."
        ) from None


def weight_edits(texts: Sequence[str]) -> tuple[WeightEdit, ...]:
    """Changes as typed: ``weight:1,447,666``, ``gain:3,ln2,12,0.5``, or a JSON file with a list.

    Raises:  InterventionError: naming the text. ResultError: a file that cannot be read.
    """
    found: list[WeightEdit] = []
    for text in texts:
        change, colon, rest = text.partition(":")
        if colon and change in FORMS:
            found.append(_typed(change, rest, text))
        elif Path(text).expanduser().is_file():
            found += _read(Path(text).expanduser())
        else:
            raise InterventionError(
                f"--bake {brief(text, 60)} is neither a JSON file here nor one of {FORM}."
            )
    return require_apart(found)


def require_apart(edits: Sequence[WeightEdit]) -> tuple[WeightEdit, ...]:
    """Refuse no changes at all, one place named twice, and a transplant into a changed layer.

    Raises:  InterventionError: naming it.
    """
    if not edits or not all(isinstance(edit, WeightEdit) for edit in edits):  # pyright: ignore[reportUnnecessaryIsInstance]  (a user gives anything)
        raise InterventionError("edits must be one or more melens.results.edit.WeightEdit.")
    seen: dict[tuple[object, ...], WeightEdit] = {}
    for edit in edits:
        if edit.place in seen:
            raise InterventionError(f"{edit.label} is named twice; give one factor.")
        seen[edit.place] = edit
    for edit in (e for e in edits if e.change == "transplant"):
        used = {edit.layer} | ({edit.donor_layer} if edit.donor is None else set[int | None]())
        if any(other is not edit and other.layer in used for other in edits):
            raise InterventionError(
                f"{edit.label}: another edit changes one of these layers; bake one after the other."
            )
    return tuple(edits)


def _typed(change: Change, rest: str, text: str) -> WeightEdit:
    names, values = FORMS[change], rest.split(",")
    least = len(names) - ("factor" in names)
    if not least <= len(values) <= len(names):
        raise InterventionError(f"--bake {brief(text, 60)} must be {_said(change)}.")
    try:
        made = dict(zip(names, map(str.strip, values), strict=False))
        return WeightEdit.model_validate({"change": change, **made})
    except ValidationError as error:
        raise InterventionError(f"--bake {brief(text, 60)}: {_first(error)}.") from None


def _read(path: Path) -> tuple[WeightEdit, ...]:
    text = read_text(path, RESULT, error=ResultError)
    try:
        return _EDITS.validate_python(json.loads(text))
    except ValidationError as error:
        raise ResultError(f"{path} is no list of weight edits: {_first(error)}.") from None
    except (ValueError, RecursionError):
        raise ResultError(f"{path} is not JSON.") from None


def _first(error: ValidationError) -> str:
    """The first complaint, with its place."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place + ': ' * bool(place)}{first['msg'].removeprefix('Value error, ')}"
