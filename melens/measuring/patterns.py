"""The reducer of attention sinks: what every key receives, without keeping any pattern."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from melens.batches import Batch
from melens.errors import CaptureError
from melens.metrics.attention import attention_entropy, key_attention

EPSILONS = (0.2, 0.3, 0.5)
Token = tuple[bool, int]
"""A massive token: (is it the first of its sequence, its id)."""


LEAST_QUERIES = 8
"""A later key counts only with this many queries behind it: the last ones mostly see themselves."""


@dataclass
class Received:
    """What one kind of key gets, summed over its occurrences."""

    alpha: Tensor
    """[head]"""
    over: Tensor
    """[eps, head]: occurrences whose alpha exceeds eps."""
    count: int
    position: int
    """The earliest one met."""

    def add(self, other: Received) -> Received:
        """Both together."""
        return Received(
            self.alpha + other.alpha,
            self.over + other.over,
            self.count + other.count,
            min(self.position, other.position),
        )

    @property
    def mean(self) -> Float[Tensor, " head"]:
        """Mean alpha over the occurrences."""
        return self.alpha / self.count

    @property
    def rates(self) -> Float[Tensor, "eps head"]:
        """Share of the occurrences whose alpha exceeds eps."""
        return self.over / self.count


@dataclass
class PatternSums:
    """Reducer of one layer's attention pattern; memory: heads x T floats, any corpus size."""

    heavy: Sequence[Tensor]
    t: int | None = None
    """Only the first T tokens of every sequence, as Gu et al.; None = whole sequences."""
    keys: Tensor | None = None
    """[1 + eps, head, key]: alpha, then whether it exceeds each eps, summed over sequences."""
    holders: Tensor | None = None
    """[2, key]: how many sequences have the key with enough queries, and their queries."""
    entropy: Tensor | None = None
    """[head], summed over queries after the first."""
    queries: int = 0
    first: Received | None = None
    tokens: dict[Token, Received] = field(default_factory=dict)
    seen: int = 0

    def update(self, x: Tensor, batch: Batch) -> None:
        """Take in ``[batch, head, query, key]``."""
        heavy = self.heavy[self.seen]
        self.seen += 1
        for pattern, ids, marked in self._whole(x.detach(), batch, heavy.to(batch.ids.device)):
            alpha = key_attention(pattern)  # [sequence, head, key]
            self._add(alpha, attention_entropy(pattern))
            for sequence, position in marked.nonzero().tolist():
                if position == 0 or alpha.shape[-1] - position >= LEAST_QUERIES:
                    key = (position == 0, int(ids[sequence, position]))
                    self._receive(key, _received(alpha[sequence, :, position], position))

    def _whole(
        self, x: Tensor, batch: Batch, heavy: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Patterns, ids and massive marks of real tokens only, the first T of each sequence."""
        upto = slice(0, self.t)
        if not batch.padded:
            yield x[:, :, upto, upto].float(), batch.ids[:, upto], heavy[:, upto]
            return
        for i in range(len(batch)):
            real = batch.mask[i].nonzero().flatten()[upto]
            pattern = x[i][:, real.to(x.device)][:, :, real.to(x.device)].float()
            yield pattern[None], batch.ids[i, real][None], heavy[i, real][None]

    def _add(self, alpha: Tensor, entropy: Tensor) -> None:
        n, _, keys = alpha.shape
        found = torch.stack([alpha, *((alpha > eps).double() for eps in EPSILONS)])
        found = reduce(found, "kind sequence head key -> kind head key", "sum")
        behind = torch.arange(keys, 0, -1)
        enough = (behind >= LEAST_QUERIES) | (behind == keys)
        holders = torch.stack([enough * n, enough * n * behind])
        if self.keys is None or self.holders is None:
            self.keys, self.holders = found * enough, holders
        else:
            wide = max(keys, self.keys.shape[-1])
            self.keys = _widened(self.keys, wide) + _widened(found * enough, wide)
            self.holders = _widened(self.holders, wide) + _widened(holders, wide)
        spread = reduce(entropy[..., 1:].cpu().double(), "sequence head query -> head", "sum")
        self.entropy = spread if self.entropy is None else self.entropy + spread
        self.queries += n * (keys - 1)
        for row in alpha[..., 0]:
            made = _received(row, 0)
            self.first = made if self.first is None else self.first.add(made)

    def _receive(self, key: Token, made: Received) -> None:
        self.tokens[key] = self.tokens[key].add(made) if key in self.tokens else made

    def result(self) -> PatternMeans:
        """Means over sequences and queries."""
        if self.keys is None or self.holders is None or self.first is None or self.entropy is None:
            raise CaptureError("PatternSums saw no batch; pass it to stream() first.")
        means = self.keys / self.holders[0].clamp_min(1)
        entropy = self.entropy / max(self.queries, 1)
        return PatternMeans(means[0], means[1:], self.holders[1], entropy, self.first, self.tokens)


@dataclass(frozen=True)
class PatternMeans:
    """One layer's attention."""

    alpha: Float[Tensor, "head key"]
    """Mean over sequences of what each key position receives; 0 where too few queries stand."""
    rates: Float[Tensor, "eps head key"]
    """Share of the sequences in which that exceeds each eps."""
    queries: Tensor
    """[key]: queries behind each key's numbers, over all sequences."""
    entropy: Float[Tensor, " head"]
    """Mean over queries after the first, in nats."""
    first: Received
    """The first token of every sequence, massive or not."""
    tokens: dict[Token, Received]
    """Massive tokens, each apart."""


def _received(alpha: Tensor, position: int) -> Received:
    over = torch.stack([(alpha > eps).double() for eps in EPSILONS])
    return Received(alpha, over, 1, position)


def _widened(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]))
