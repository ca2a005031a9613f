"""sinks(): which keys draw attention, and from which layer on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from melens.batches import Batch
from melens.capture import Reducer
from melens.errors import CaptureError, ModelError, PromptError
from melens.inputs import Inputs, Source, prepare
from melens.measuring.located import Located, run_once, settle
from melens.metrics import uniform_alpha
from melens.metrics.attention import attention_entropy, key_attention
from melens.models.anatomy import anatomy, pattern_hook
from melens.progress import say_once
from melens.protocols import HookedModel, ModelLike
from melens.results import Sinks
from melens.results.reading import HoldsMELayer
from melens.results.sinks import SINK_EPS, USUAL_EPS, HeadSink, KeySink, Span, TokenSink
from melens.settings import Progress

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
    learned: bool = False
    """Whether a learned sink takes its share of every row."""
    keys: Tensor | None = None
    """[1 + eps, head, key]: alpha, then whether it exceeds each eps, summed over sequences."""
    holders: Tensor | None = None
    """[2, key]: how many sequences have the key with enough queries, and their queries."""
    entropy: Tensor | None = None
    """[head], summed over queries after the first."""
    missing: Tensor | None = None
    """[head]: what rows lack of 1, summed over all queries: a learned sink's share."""
    rows: int = 0
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
            if self.learned:
                lacking = (1 - pattern.sum(-1)).cpu().double().sum((0, 2))
                self.missing = lacking if self.missing is None else self.missing + lacking
                self.rows += pattern.shape[0] * pattern.shape[2]
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
        return PatternMeans(
            means[0],
            means[1:],
            self.holders[1],
            entropy,
            self.first,
            self.tokens,
            None if self.missing is None else self.missing / max(self.rows, 1),
        )


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
    missing: Float[Tensor, " head"] | None
    """Mean over all queries of what their rows lack of 1; None without a learned sink."""


def _received(alpha: Tensor, position: int) -> Received:
    over = torch.stack([(alpha > eps).double() for eps in EPSILONS])
    return Received(alpha, over, 1, position)


def _widened(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]))


T_PAPER = 64
"""Gu et al. measure sinks over the first 64 tokens."""
ONSET_SHARE = 0.5
"""Sinks begin at the first layer in which at least this share of (sequence, head) has one."""


def sinks(
    model: ModelLike,
    me_layer: HoldsMELayer | None = None,
    prompts: Source = None,
    *,
    t: int = T_PAPER,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Sinks:
    """Attention sinks per layer, head and key position, by Gu et al.'s Sink_k^eps.

    One forward pass; per layer only sums over heads and keys are kept, never a pattern.
    Definitions: docs/definitions.md.

    Args:    model: anything ``melens.load`` takes.
             me_layer: what ``melens.locate`` found on this model; None = locate first.
             prompts: texts, as for ``melens.locate``.
             t: T, the tokens of a sequence that count (64 in the paper); shorter sequences count
             whole.
             progress: called with (rows done, rows in all).
    Raises:  PromptError: t below 2, or as ``locate``. ResultError: ``me_layer`` is of other
             weights. ModelError: no layer has attention, or as ``locate``.
    Source:  Gu et al., "When Attention Sink Emerges in Language Models", 2024.
    """
    check_t(t)
    inputs = prepare(model, prompts, batch_size=batch_size)
    check_attention(inputs.model)
    if t > (longest := max(map(len, inputs.rows))):
        say_once(
            f"T = {t} exceeds the longest text ({longest} tokens), so every text counts whole. "
            "Give longer texts, or a larger length."
        )
    located = settle(inputs, me_layer, progress=progress)
    plan = SinkPlan(inputs, located, t)
    run_once(inputs, plan.taps, progress=progress)
    return plan.result()


def check_t(t: int) -> None:
    """Refuse a T that no query can fill."""
    if not isinstance(t, int) or t < 2:
        raise PromptError(
            f"t must be a whole number of at least 2, got {t!r}; the paper takes {T_PAPER}."
        )


def check_attention(model: HookedModel) -> None:
    """Refuse a model that has no attention at all, or none that can be read."""
    parts = anatomy(model)
    if not parts.attention_layers:
        raise ModelError(
            f"{parts.why_no_attention()}; so no sinks can be measured. melens.locate and "
            "melens.describe work on it."
        )


class SinkPlan:
    """The taps of :func:`sinks`, and how their numbers become its result."""

    def __init__(self, inputs: Inputs, located: Located, t: int) -> None:
        self.inputs, self.located, self.t = inputs, located, t
        blocks = anatomy(inputs.model).blocks
        self.sums = {
            block.layer: PatternSums(located.heavy, t, block.learned_sink)
            for block in blocks
            if block.attention
        }

    @property
    def taps(self) -> Mapping[str, Reducer]:
        """Hook -> reducer."""
        return {pattern_hook(layer): tap for layer, tap in self.sums.items()}

    def result(self) -> Sinks:
        """The frozen result."""
        found, n = self.located.me_layer, self.located.me_layer.n_layers
        means = {layer: tap.result() for layer, tap in self.sums.items()}
        first = {layer: mean.first for layer, mean in means.items()}
        later = {layer: _together(mean, first=False) for layer, mean in means.items()}
        others = any(received is not None for received in later.values())
        leading = any(first for mean in means.values() for first, _ in mean.tokens)
        of_first = leading or not others
        passed = spans(_rates(first if of_first else later, n)[USUAL_EPS])
        lengths = [min(len(row), self.t) for row in self.inputs.rows]
        return Sinks(
            me_layer=found.me_layer,
            n_layers=n,
            t=self.t,
            sequences=self.inputs.total,
            sink_rate=_rates(first, n),
            overall=_overall(first),
            head_rate=_head_rates(first, n),
            attention_to_token=_attention(first, n),
            uniform=sum(map(uniform_alpha, lengths)) / len(lengths),
            entropy=tuple(
                means[layer].entropy.mean().item() if layer in means else None for layer in range(n)
            ),
            tokens=self._tokens(means),
            others=_rates(later, n) if others else None,
            onset_layer=passed[0].first if passed else None,
            spans=passed,
            onset_of="first" if of_first else "others",
            onset_rule=f"{ONSET_SHARE:.0%} of heads with a sink at eps {SINK_EPS}",
            learned_sink=self._learned(means),
            heads=_heads(means),
            keys=_keys(means),
            run=self.inputs.run_info(seed=found.run.seed, t=self.t),
        )

    def _learned(self, means: Mapping[int, PatternMeans]) -> tuple[tuple[float, ...] | None, ...]:
        """By layer and head; () where no layer has a learned sink."""
        blocks = anatomy(self.inputs.model).blocks
        if not any(block.learned_sink for block in blocks):
            return ()
        return tuple(
            None
            if n not in means or (lacking := means[n].missing) is None
            else tuple(lacking.tolist())
            for n in range(len(blocks))
        )

    def _tokens(self, means: Mapping[int, PatternMeans]) -> tuple[TokenSink, ...]:
        n = self.located.me_layer.n_layers
        held = dict.fromkeys(key for mean in means.values() for key in mean.tokens)
        made = []
        for first, token_id in sorted(held, key=lambda key: (not key[0], key[1])):
            got = {layer: mean.tokens[first, token_id] for layer, mean in means.items()}
            made.append(
                TokenSink(
                    position=next(iter(got.values())).position,
                    token_id=token_id,
                    token=self.inputs.decode(token_id),
                    count=next(iter(got.values())).count,
                    attention=_attention(got, n),
                    sink_rate=_rates(got, n),
                    overall=_overall(got),
                )
            )
        return tuple(made)


def spans(rates: Sequence[float | None]) -> tuple[Span, ...]:
    """Stretches of layers in which the rate reaches ONSET_SHARE; None (no attention) ends none."""
    made: list[Span] = []
    open_ = False
    for layer, rate in enumerate(rates):
        if rate is None:
            continue
        if rate >= ONSET_SHARE:
            start = made.pop().first if open_ else layer
            made.append(Span(first=start, last=layer))
        open_ = rate >= ONSET_SHARE
    return tuple(made)


Got = Mapping[int, Received | None]


def _together(mean: PatternMeans, *, first: bool) -> Received | None:
    """All massive tokens of one kind, or None where there are none."""
    found: Received | None = None
    for (is_first, _), received in mean.tokens.items():
        if is_first == first:
            found = received if found is None else found.add(received)
    return found


def _attention(got: Got, n: int) -> tuple[float | None, ...]:
    return tuple(
        here.mean.mean().item() if (here := got.get(layer)) else None for layer in range(n)
    )


def _rates(got: Got, n: int) -> dict[str, tuple[float | None, ...]]:
    return {
        str(eps): tuple(
            here.rates[i].mean().item() if (here := got.get(layer)) else None for layer in range(n)
        )
        for i, eps in enumerate(EPSILONS)
    }


def _head_rates(got: Mapping[int, Received], n: int) -> dict[str, tuple[float | None, ...]]:
    return {
        str(eps): tuple(
            (here.mean > eps).double().mean().item() if (here := got.get(i)) else None
            for i in range(n)
        )
        for eps in EPSILONS
    }


def _overall(got: Got) -> dict[str, float]:
    """Over all (occurrence, layer, head); heads are equally many in every layer."""
    found = [received for received in got.values() if received is not None]
    return {
        str(eps): sum(here.rates[i].mean().item() for here in found) / len(found)
        for i, eps in enumerate(EPSILONS)
    }


def _heads(means: Mapping[int, PatternMeans]) -> tuple[HeadSink, ...]:
    return tuple(
        HeadSink(
            layer=layer,
            head=head,
            alpha=mean.first.mean[head].item(),
            rate=_by_eps(mean.first.rates[:, head]),
            entropy=mean.entropy[head].item(),
        )
        for layer, mean in means.items()
        for head in range(len(mean.entropy))
    )


def _keys(means: Mapping[int, PatternMeans]) -> tuple[KeySink, ...]:
    """Every key position that is a sink of some head in some sequence, at the smallest eps."""
    return tuple(
        KeySink(
            layer=layer,
            head=head,
            position=position,
            alpha=mean.alpha[head, position].item(),
            rate=_by_eps(mean.rates[:, head, position]),
            queries=int(mean.queries[position]),
        )
        for layer, mean in means.items()
        for head, position in mean.rates[0].nonzero().tolist()
    )


def _by_eps(rates: Tensor) -> dict[str, float]:
    return {str(eps): rate for eps, rate in zip(EPSILONS, rates.tolist(), strict=True)}
