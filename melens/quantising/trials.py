"""What is kept whole beside each scheme: protections, and random controls of the same size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from melens.batches import Batch, padded_batches, with_prefix
from melens.errors import SiteError
from melens.inputs import Inputs
from melens.intervals import random_order
from melens.interventions.massive import massive_tokens
from melens.isolating.spikes import DownEntry
from melens.isolating.weight_damage import places_of, stand_ins
from melens.models.experts import experts_of
from melens.models.ffn import ffn_of
from melens.protocols import HookedModel
from melens.quantising.layers import LinearWeight, PlainModel
from melens.quantising.running import Entries, largest_read
from melens.quantising.schemes import Scheme
from melens.results.locate import MELayer
from melens.results.quantise import Role
from melens.shapes import TokenMask

IdRows = Sequence[Sequence[int]]
BATCHES = 100_003
"""A control's draws differ from batch to batch, and from seed to seed."""


@dataclass(frozen=True)
class TrialPlan:
    """One thing kept whole, or none."""

    name: str = "as is"
    role: Role = "as is"
    control_of: str | None = None
    seed: int | None = None
    entries: Entries = field(default_factory=dict)
    modules: frozenset[str] = frozenset()

    @property
    def key(self) -> str:
        """Tells it from the others of a scheme."""
        return self.name if self.seed is None else f"{self.name} {self.seed} ({self.control_of})"


AS_IS = TrialPlan()


@dataclass(frozen=True)
class TextPrefix:
    """Tokens before every text."""

    token_ids: tuple[int, ...]
    starts_texts: bool
    """Whether the first of them is what every text begins with, and stands for it."""


@dataclass(frozen=True)
class MarkedTexts:
    """Rows of one batch size, and which of their tokens a trial can keep."""

    batches: list[Batch]
    massive: list[Tensor]
    """Of each batch, ``[batch, pos]``."""
    prefix: int
    """Tokens of a prefix, which are computed as they are; scored are the logits after it."""

    @classmethod
    def of(
        cls,
        model: HookedModel,
        rows: IdRows,
        located: MELayer | None,
        *,
        batch_size: int,
        prefix: TextPrefix | None = None,
    ) -> MarkedTexts:
        """Right-padded batches; one partial pass for the massive tokens.

        Args:    located: None = nothing is massive.
        """
        if prefix is not None:
            rows = with_prefix(rows, prefix.token_ids, replaces_first=prefix.starts_texts)
        batches = padded_batches(rows, batch_size)
        if located is None:
            marks = [torch.zeros_like(batch.mask) for batch in batches]
        else:
            marks = [found.cpu() for found, _ in massive_tokens(model, located, batches)]
        return cls(batches, marks, 0 if prefix is None else len(prefix.token_ids))

    @property
    def massive_count(self) -> int:
        """Massive tokens of all texts."""
        return sum(int(marks.sum()) for marks in self.massive)

    def before(self, at: int) -> int:
        """Texts in the batches before one."""
        return sum(map(len, self.batches[:at]))

    def differs_from_first(self, first: int) -> bool:
        """Whether the massive tokens are others than each text's first ones."""
        pairs = zip(self.batches, self.massive, strict=True)
        return any(
            not torch.equal(marks, batch.mask & (batch.positions < first)) for batch, marks in pairs
        )

    def kept(self, trial: TrialPlan, at: int, *, first: int) -> TokenMask | None:
        """The tokens of one batch that a trial keeps whole; None = none."""
        if trial.name != "random-tokens":
            return self._named(trial.name, at, first=first)
        assert trial.control_of is not None
        assert trial.seed is not None
        wanted, free = self._random(trial.control_of, at, first=first)
        return _as_many(wanted, free, seed=trial.seed * BATCHES + at)

    def has_controls(self, name: str, *, first: int) -> bool:
        """Whether every text has as many other tokens as a protection keeps."""
        pairs = (self._random(name, at, first=first) for at in range(len(self.batches)))
        return all(bool((wanted.sum(-1) <= free.sum(-1)).all()) for wanted, free in pairs)

    def _named(self, name: str, at: int, *, first: int) -> TokenMask | None:
        batch = self.batches[at]
        if name == "massive-token":
            return self.massive[at]
        count = {"first-tokens": first, "prefix": self.prefix}.get(name)
        return None if count is None else batch.mask & (batch.positions < count)

    def _random(self, name: str, at: int, *, first: int) -> tuple[TokenMask, TokenMask]:
        """What a control stands for, and the tokens that it is drawn from."""
        batch, wanted = self.batches[at], self._named(name, at, first=first)
        assert wanted is not None
        ordinary = batch.mask & ~self.massive[at] & (batch.positions >= self.prefix)
        return wanted, ordinary & ~wanted


def _as_many(wanted: TokenMask, free: TokenMask, *, seed: int) -> TokenMask:
    """In every row as many tokens as are wanted, drawn from the free ones."""
    rng, made = torch.Generator().manual_seed(seed), torch.zeros_like(free)
    for row, (count, places) in enumerate(zip(wanted.sum(-1).tolist(), free, strict=True)):
        at = places.nonzero()[:, 0]
        made[row, at[torch.randperm(len(at), generator=rng)[:count]]] = True
    return made


@dataclass
class Calibration:
    """The largest |entry| that every linear layer reads, token by token, of texts not scored."""

    texts: MarkedTexts
    sizes: list[dict[str, Tensor]]
    found: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)
    """By trial and number of first tokens: the same for every batch."""

    @classmethod
    def of(cls, plain: PlainModel, texts: MarkedTexts) -> Calibration:
        """One pass over the texts."""
        found = (largest_read(plain, batch) for batch in texts.batches)
        return cls(texts, [{name: x.cpu() for name, x in sizes.items()} for sizes in found])

    def largest(self, trial: TrialPlan, *, first: int) -> dict[str, float]:
        """Module's name -> its largest |entry|, the tokens that a trial keeps left out."""
        if (trial.key, first) in self.found:
            return self.found[trial.key, first]
        made = self.found[trial.key, first] = {}
        for at, sizes in enumerate(self.sizes):
            kept = self.texts.kept(trial, at, first=first)
            for name, x in sizes.items():
                own = x if kept is None else x.masked_fill(kept, 0.0)
                made[name] = max(made.get(name, 0.0), float(own.max()))
        return made


@dataclass(frozen=True)
class Choices:
    """What can be kept whole in one model."""

    super_weights: TrialPlan | None
    layers: TrialPlan | None
    randoms: tuple[TrialPlan, ...]
    """Controls of these two."""

    @property
    def every(self) -> list[TrialPlan]:
        """Weights and layers that any scheme's trials keep."""
        return [*filter(None, (self.super_weights, self.layers)), *self.randoms]

    def of(self, scheme: Scheme, tokens: Sequence[str], *, seeds: Sequence[int]) -> list[TrialPlan]:
        """The trials of a scheme, controls behind what they control; the first keeps nothing.

        Args:    tokens: which of massive-token, first-tokens and prefix the texts have.
        """
        made = [AS_IS]
        if scheme.inputs or scheme.cache:
            for name in tokens:
                if name == "first-tokens" and not scheme.cache:
                    continue
                made.append(TrialPlan(name, "protected"))
                made += [TrialPlan("random-tokens", "control", name, seed) for seed in seeds]
        if scheme.weights:
            for one in filter(None, (self.super_weights, self.layers)):
                made.append(one)
                made += [t for t in self.randoms if t.control_of == one.name]
        return made


def choices(
    inputs: Inputs,
    plain: PlainModel,
    located: MELayer | None,
    found: Sequence[DownEntry],
    *,
    seeds: Sequence[int],
) -> Choices:
    """Super weights and the ME and erase layers' down projections, with what stands for them."""
    downs = _down_projections(inputs.model, plain)
    supers, layers, randoms = None, None, []
    entries = [entry for entry in found if entry.layer in downs]
    if entries:
        supers = TrialPlan("super-weights", "protected", entries=_indices(downs, entries))
        places, _ = places_of(inputs.model)
        for seed in seeds:
            drawn = _indices(downs, stand_ins(places, entries, seed=seed))
            randoms.append(TrialPlan("random-weights", "control", "super-weights", seed, drawn))
    kept = sorted({n for n in _emerging(located) if n in downs})
    sizes = {n: one.stored.numel() for n, one in downs.items()}
    likes = {sizes[n] for n in kept}
    others = [n for n in downs if n not in kept and sizes[n] in likes]
    if kept and len(others) >= len(kept):
        paths = frozenset(downs[n].path for n in kept)
        layers = TrialPlan("me-layers", "protected", modules=paths)
        randoms += [
            replace(layers, name="random-layers", role="control", control_of="me-layers",
                    seed=seed, modules=_drawn(downs, others, len(kept), seed))
            for seed in seeds
        ]  # fmt: skip
    return Choices(supers, layers, tuple(randoms))


def _drawn(
    downs: Mapping[int, LinearWeight], layers: Sequence[int], count: int, seed: int
) -> frozenset[str]:
    order = random_order(len(layers), seed=seed).tolist()
    return frozenset(downs[layers[n]].path for n in order[:count])


def _emerging(located: MELayer | None) -> Iterator[int]:
    if located is None:
        return
    yield from (n for n in (located.me_layer, located.erase_layer) if n is not None and n >= 0)


def _down_projections(model: HookedModel, plain: PlainModel) -> dict[int, LinearWeight]:
    """Layer -> its down projection among the plain model's weights, where it has one."""
    found = {}
    for layer in range(plain.n_layers):
        for read in (
            lambda n: ffn_of(model, n).projection.weight,
            lambda n: experts_of(model, n).module.down_proj,
        ):
            try:
                one = plain.holding(read(layer))
            except (SiteError, AttributeError):
                continue
            if one is not None:
                found[layer] = one
                break
    return found


def _indices(
    downs: Mapping[int, LinearWeight], entries: Sequence[DownEntry]
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """By weight: (expert,) residual dimension and neuron."""
    made: dict[str, tuple[tuple[int, ...], ...]] = {}
    for entry in entries:
        expert = () if entry.expert is None else (entry.expert,)
        at = (*expert, entry.row, entry.column)
        name = downs[entry.layer].name
        made[name] = (*made.get(name, ()), at)
    return made
