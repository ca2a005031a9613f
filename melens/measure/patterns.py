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


@dataclass
class Received:
    """What one kind of key gets, summed over its occurrences."""

    alpha: Tensor
    """[head]"""
    over: Tensor
    """[eps, head]: occurrences whose alpha exceeds eps."""
    count: int = 1

    def add(self, other: Received) -> Received:
        """Both together."""
        return Received(self.alpha + other.alpha, self.over + other.over, self.count + other.count)


@dataclass
class PatternSums:
    """Reducer of one layer's attention pattern; memory: heads x T floats, any corpus size."""

    heavy: Sequence[Tensor]
    t: int | None = None
    """Only the first T tokens of every sequence, as Gu et al.; None = whole sequences."""
    alpha: Tensor | None = None
    """[head, key], summed over the sequences that have the key."""
    holders: Tensor | None = None
    """[key]: how many sequences have it."""
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
            alpha = key_attention(pattern).cpu()  # [sequence, head, key]
            self._add(alpha, attention_entropy(pattern))
            for sequence, position in marked.nonzero().tolist():
                key = (position == 0, int(ids[sequence, position]))
                self._receive(key, alpha[sequence, :, position])

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
        if self.alpha is None or self.holders is None:
            self.alpha = alpha.new_zeros(alpha.shape[1:])
            self.holders = torch.zeros(keys, dtype=torch.long)
        if keys > len(self.holders):
            extra = keys - len(self.holders)
            self.alpha = torch.nn.functional.pad(self.alpha, (0, extra))
            self.holders = torch.nn.functional.pad(self.holders, (0, extra))
        self.alpha[:, :keys] += reduce(alpha, "sequence head key -> head key", "sum")
        self.holders[:keys] += n
        spread = reduce(entropy[..., 1:].double(), "sequence head query -> head", "sum").cpu()
        self.entropy = spread if self.entropy is None else self.entropy + spread
        self.queries += n * (keys - 1)
        for row in alpha[..., 0]:
            made = _received(row)
            self.first = made if self.first is None else self.first.add(made)

    def _receive(self, key: Token, alpha: Tensor) -> None:
        made = _received(alpha)
        self.tokens[key] = self.tokens[key].add(made) if key in self.tokens else made

    def result(self) -> PatternMeans:
        """Means over sequences and queries."""
        if self.alpha is None or self.holders is None or self.first is None or self.entropy is None:
            raise CaptureError("PatternSums saw no batch; pass it to stream() first.")
        return PatternMeans(
            self.alpha / self.holders, self.entropy / max(self.queries, 1), self.first, self.tokens
        )


@dataclass(frozen=True)
class PatternMeans:
    """One layer's attention."""

    alpha: Float[Tensor, "head key"]
    """Mean over sequences of the attention that each key position receives."""
    entropy: Float[Tensor, " head"]
    """Mean over queries after the first, in nats."""
    first: Received
    """The first token of every sequence, massive or not."""
    tokens: dict[Token, Received]
    """Massive tokens, each apart."""


def _received(alpha: Tensor) -> Received:
    return Received(alpha, torch.stack([(alpha > eps).double() for eps in EPSILONS]))
