"""Teacher forcing: how well a model foresees given tokens, under many edits, paired by token.

A batch runs once without any edit; each edit then only runs the blocks that it can change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from melens.batches import Batch
from melens.capture import evaluating, fit_ids
from melens.errors import PromptError
from melens.evaluating.edits import EditCondition, EditRecord, applied, first_layer, where_held
from melens.inputs import Inputs
from melens.interventions import MaskRecord
from melens.interventions.massive import MassiveRule
from melens.interventions.target import Tokens, these
from melens.metrics.divergence import kl_divergence, same_top1
from melens.metrics.loss import nll
from melens.protocols import HookedModel, JsonObject
from melens.results import MELayer
from melens.resume import Resumable, Ways
from melens.shapes import TokenMask

AT_ONCE = 256
"""Positions whose logits are held at once: with 152 k tokens of vocabulary 156 MB each."""
TOKENS = 1024
"""Tokens a batch, padding included: what 8 x 128 are."""


@dataclass(frozen=True)
class Forced:
    """One item: token ids, and which of them are to be foreseen."""

    id: str
    ids: tuple[int, ...]
    scored: tuple[bool, ...]
    """As long as ``ids``; the first is never scored, since nothing comes before it."""
    about: JsonObject
    """What its rows keep of it: the text, a length, a depth."""

    @classmethod
    def scored_from(cls, start: int, name: str, ids: Sequence[int], about: JsonObject) -> Forced:
        """An item whose tokens from index ``start`` on are scored."""
        return cls(name, tuple(ids), tuple(at >= start for at in range(len(ids))), about)

    def __post_init__(self) -> None:
        """Refuse an item that nothing can be measured on."""
        if len(self.ids) != len(self.scored) or not any(self.scored[1:]) or self.scored[0]:
            raise PromptError(
                f"item {self.id} needs at least one scored token behind its first; it has "
                f"{len(self.ids)} tokens, {sum(self.scored)} scored."
            )


@dataclass(frozen=True)
class Foreseen:
    """One item under one condition, token by token in float32; all ``[scored token]``."""

    loss: Float[Tensor, " token"]
    """-ln p of each scored token, nats."""
    right: Tensor
    """Whether the token is the likeliest: all of them = greedy decoding would give them."""
    kl: Float[Tensor, " token"]
    """KL(unedited || edited) of the distribution that foresees the token, nats; 0 for base."""
    agree: Tensor
    """Whether the edited and the unedited model put the same token first."""


@dataclass(frozen=True)
class MassiveIn:
    """An item's massive tokens, read at the ME Layer's output of the unedited run."""

    tokens: int
    coordinate: float
    """Largest |x| in the massive dimension, residual units; 0 without such a token."""
    norm_ratio: float | None
    """Largest norm over the located texts' median token norm; 0 without such a token, None where
    the median is not known (the embedding)."""

    @classmethod
    def of(cls, marks: Tensor, sizes: Tensor, median_norm: float | None) -> MassiveIn:
        """From one row's marks ``[pos]``, and |x| and norm of its tokens ``[2, pos]``."""
        largest = (sizes * marks).amax(-1).tolist()
        ratio = largest[1] / median_norm if median_norm else None
        return cls(int(marks.sum()), largest[0], ratio)


@dataclass(frozen=True)
class ForcedOutcome:
    """A batch of items under every condition, items as given."""

    items: tuple[Forced, ...]
    found: dict[str, tuple[Foreseen, ...]]
    """Condition's name -> one an item."""
    energy: dict[str, float]
    """Mask conditions' names -> masked share of the token's energy at the attention input."""
    massive: tuple[MassiveIn | None, ...]
    """One an item: its tokens that the edits change; None without a located ME Layer."""

    def each(self) -> Iterator[ItemOutcome]:
        """Condition after condition, every item of the batch under it."""
        plain = self.found["base"]
        for name, found in self.found.items():
            for at, item in enumerate(self.items):
                yield ItemOutcome(
                    item, name, found[at], plain[at], self.massive[at], self.energy.get(name)
                )


@dataclass(frozen=True)
class ItemOutcome:
    """One item under one condition."""

    item: Forced
    condition: str
    found: Foreseen
    plain: Foreseen
    """The same item unedited."""
    massive: MassiveIn | None
    energy: float | None
    """As in :class:`ForcedOutcome`: of the batch; None where the edit is no mask."""


class Runner:
    """Runs items under conditions; checks once that the model can be resumed from the middle."""

    def __init__(
        self,
        model: HookedModel | Inputs,
        conditions: Sequence[EditCondition],
        me_layer: MELayer | None,
        *,
        batch_tokens: int = TOKENS,
    ) -> None:
        """Args:  model: a bridge or ready Inputs. conditions: the first is the unedited model."""
        self.inputs, self.me_layer = Inputs.of(model), me_layer
        self.model = self.inputs.model
        self.conditions = tuple(conditions)
        self.starts = [first_layer(self.model, c.edit, me_layer) for c in self.conditions]
        self.batch_tokens = batch_tokens
        self._ways: Ways | None = None

    def run(self, items: Sequence[Forced]) -> Iterator[ForcedOutcome]:
        """Batches of items of like length, longest first (what does not fit fails at once)."""
        for chosen in self.batches(items):
            yield self.outcome(chosen, self.conditions)

    @torch.no_grad()
    def outcome(
        self, items: Sequence[Forced], conditions: Sequence[EditCondition]
    ) -> ForcedOutcome:
        """One batch under some of the conditions; the unedited run comes first, always."""
        batch = Batch.pad([list(item.ids) for item in items])
        batch = fit_ids(self.model, batch)
        clean = Resumable(self.model, batch, ways=self._ways)
        self._ways = clean.ways
        marks, massive = self._massive(clean)
        tokens = None if marks is None else these(marks)
        finals, energy = {}, {}
        for condition in conditions:
            start = self.starts[self.conditions.index(condition)]
            # A batch without the token is as it was; that no item has it is refused beforehand.
            with where_held(self._entered(condition, tokens)) as record:
                finals[condition.name] = clean.run(start, clean.resid_pre(start))
            if isinstance(record, MaskRecord) and record.mean_energy is not None:
                energy[condition.name] = record.mean_energy
        found: dict[str, list[Foreseen]] = {condition.name: [] for condition in conditions}
        for row, item in enumerate(items):
            for name, foreseen in self._foresee(clean, item, row, finals).items():
                found[name].append(foreseen)
        return ForcedOutcome(tuple(items), {k: tuple(v) for k, v in found.items()}, energy, massive)

    def _massive(self, clean: Resumable) -> tuple[TokenMask | None, tuple[MassiveIn | None, ...]]:
        """The massive tokens of the unedited run: what every condition of the batch edits."""
        if self.me_layer is None:
            return None, (None,) * len(clean.batch)
        rule = MassiveRule.of(self.me_layer)
        marks, sizes = rule.marks(clean.resid_pre(rule.layer + 1))
        marks = marks & clean.batch.mask.to(marks.device)
        rows = zip(marks, sizes.unbind(1), strict=True)
        return marks, tuple(MassiveIn.of(row, both, rule.median_norm) for row, both in rows)

    def _entered(
        self, condition: EditCondition, tokens: Tokens
    ) -> AbstractContextManager[EditRecord]:
        if condition.edit.name == "none":
            return nullcontext()
        return applied(self.inputs, condition.edit, self.me_layer, tokens=tokens)

    def _foresee(
        self, clean: Resumable, item: Forced, row: int, finals: dict[str, Tensor]
    ) -> dict[str, Foreseen]:
        """Logits of one row's scored tokens alone: a batch's are the largest tensor there is."""
        base = clean.resid_pre(clean.n_layers)
        scored = torch.tensor(item.scored).nonzero()[:, 0].to(base.device)
        made: dict[str, list[Foreseen]] = {name: [] for name in finals}
        with evaluating(self.model):
            for at in scored.split(AT_ONCE):
                wanted = clean.batch.ids[row, at]
                plain = clean.logits(base[row : row + 1, at - 1])[0].float().log_softmax(-1)
                for name, final in finals.items():
                    edited = plain
                    if final is not base:
                        logits = clean.logits(final[row : row + 1, at - 1])[0]
                        edited = logits.float().log_softmax(-1)
                    made[name].append(_compare(edited, plain, wanted))
        return {name: _joined(parts) for name, parts in made.items()}

    def batches(self, items: Sequence[Forced], tokens: int | None = None) -> Iterator[list[Forced]]:
        """What runs together; ``tokens`` = at most so many, None = the runner's own number."""
        most = self.batch_tokens if tokens is None else tokens
        queue = sorted(items, key=lambda item: -len(item.ids))
        while queue:
            count = max(1, most // len(queue[0].ids))
            yield queue[:count]
            queue = queue[count:]


def _joined(parts: Sequence[Foreseen]) -> Foreseen:
    names = ("loss", "right", "kl", "agree")
    return Foreseen(**{name: torch.cat([getattr(p, name) for p in parts]) for name in names})


def _compare(
    edited: Float[Tensor, "token vocab"],
    plain: Float[Tensor, "token vocab"],
    wanted: Int[Tensor, " token"],
) -> Foreseen:
    return Foreseen(
        loss=nll(edited, wanted).cpu(),
        right=(edited.argmax(-1) == wanted).cpu(),
        kl=kl_divergence(plain, edited).clamp_min(0).cpu(),
        agree=same_top1(edited, plain).cpu(),
    )
