"""Which tokens to put before every text, so that no later token turns massive."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from melens.batches import Batch, padded_batches, with_prefix
from melens.capture import evaluating
from melens.errors import InterventionError
from melens.exporting.subject import transformers_of
from melens.inputs import Source, prepare
from melens.interventions.massive import massive_tokens
from melens.interventions.target import require_located_here
from melens.metrics.loss import next_token_loss
from melens.protocols import HookedModel, ModelLike
from melens.results import MELayer
from melens.results.edit import ChosenPrefix
from melens.results.reading import HoldsMELayer, located_in
from melens.settings import require_whole

CANDIDATES = 6
"""Token ids that a search puts together; the located ones come in the order of their size."""
MOST = 4


@dataclass
class _Texts:
    """The reference texts, and what they are run with."""

    model: HookedModel
    me_layer: MELayer
    rows: list[list[int]]
    stands: bool
    """Whether all begin with one token, which the prefix then begins with."""
    batch_size: int
    tried: int = 0

    def batches(self, tokens: Sequence[int]) -> list[Batch]:
        """The texts after a prefix, or as they are."""
        rows = with_prefix(self.rows, tokens, replaces_first=self.stands) if tokens else self.rows
        return padded_batches(rows, self.batch_size)

    def massive(self, tokens: Sequence[int]) -> int:
        """How many of the texts' own tokens are massive after a prefix."""
        self.tried += 1
        own = len(tokens) if tokens else int(self.stands)
        marks = massive_tokens(self.model, self.me_layer, self.batches(tokens))
        return sum(int(found[:, own:].sum()) for found, _ in marks)

    @torch.no_grad()
    def loss(self, tokens: Sequence[int]) -> float:
        """Nats a token, over every text's tokens after its first."""
        hf, total, count = transformers_of(self.model), 0.0, 0
        start = (len(tokens) - self.stands if tokens else 0) + 1
        with evaluating(hf):
            for batch in self.batches(tokens):
                here = batch.to(next(hf.parameters()).device)
                logits = hf(here.ids, attention_mask=here.mask.long(), use_cache=False).logits
                losses = next_token_loss(logits, here.ids, here.mask)
                total += float(losses[:, start:].double().sum())
                count += int(here.mask[:, start:].sum())
        return total / count


def choose_prefix(
    model: ModelLike,
    texts: Source = None,
    *,
    me_layer: HoldsMELayer,
    most: int = 3,
    batch_size: int = 4,
) -> ChosenPrefix:
    """The fewest tokens after which no token of the texts is massive; of equals, the lowest loss.

    Searched over the located massive tokens and BOS, in every order. Where no prefix of up to
    ``most`` tokens is enough, the one that leaves the fewest massive tokens.

    Args:    model: as for ``melens.locate``; the texts too. Where all texts begin with one token
             (BOS), the prefix begins with it as well, and stands for it.
             me_layer: where the model was located. most: tokens at most, 1 to 4.
    Raises:  InterventionError: nothing massive was located. ResultError: on other weights.
    Source:  PrefixQuant, 2024 (arXiv 2410.05265).
    """
    require_whole("most", most)
    found = located_in(me_layer)
    if most > MOST or found is None or not found.massive:
        raise InterventionError(
            f"a prefix of at most {MOST} tokens is searched, and only where a massive token was "
            "located; run melens locate first."
        )
    ready = prepare(model, texts, batch_size=batch_size)
    require_located_here(ready.model, found)
    room = (ready.model.cfg.n_ctx or 1 << 30) - most
    rows = [row[:room] for row in ready.rows]
    stands = len({row[0] for row in rows}) == 1
    here = _Texts(ready.model, found, rows, stands, batch_size)
    best = _searched(here, _candidates(ready.model, found, rows, stands), most)
    return ChosenPrefix(
        token_ids=best,
        tokens=tuple(map(ready.decode, best)),
        starts_texts=stands,
        tried=here.tried,
        counted=sum(len(row) - stands for row in rows),
        massive_with=here.massive(best),
        massive_without=here.massive(()),
        loss_with=here.loss(best),
        loss_without=here.loss(()),
    )


def _candidates(
    model: HookedModel, me_layer: MELayer, rows: Sequence[Sequence[int]], stands: bool
) -> Callable[[int], Iterator[tuple[int, ...]]]:
    """All prefixes of a size."""
    start = getattr(model.tokenizer, "bos_token_id", None)
    ids = [] if start is None else [start]
    ids += [token.token_id for token in me_layer.massive if token.dim == me_layer.massive[0].dim]
    several = list(dict.fromkeys(ids))[:CANDIDATES]
    if stands:
        first = rows[0][0]
        rest = [token for token in several if token != first]
        return lambda size: ((first, *more) for more in itertools.permutations(rest, size - 1))
    return lambda size: itertools.permutations(several, size)


def _searched(
    here: _Texts, prefixes: Callable[[int], Iterator[tuple[int, ...]]], most: int
) -> tuple[int, ...]:
    least: tuple[int, tuple[int, ...]] | None = None
    for size in range(1, most + 1):
        counts = {tokens: here.massive(tokens) for tokens in prefixes(size)}
        enough = [tokens for tokens, count in counts.items() if count == 0]
        if enough:
            return min(enough, key=here.loss)
        for tokens, count in counts.items():
            if least is None or count < least[0]:
                least = count, tokens
    assert least is not None
    return least[1]
