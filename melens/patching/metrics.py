"""What a patched run is judged by: one number a row, and the positions and layers it needs.

A metric is a frozen description that ``bind`` turns into a readout of one recorded run. A new one
is a class registered in ``METRICS_OF_PATCH``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from melens.errors import MetricError, ModelError
from melens.framing import plain_ids
from melens.models.anatomy import anatomy
from melens.patching.readouts import (
    CoordinateReadout,
    DifferenceReadout,
    DivergenceReadout,
    LossReadout,
    OwnReadout,
    Readout,
    SinkReadout,
)
from melens.protocols import HookedModel
from melens.registry import Registry
from melens.results import MELayer
from melens.results.sinks import SINK_EPS
from melens.resume import Resumable
from melens.store import digest

Token = int | str


@runtime_checkable
class PatchMetric(Protocol):
    """What patch() measures."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def about(self) -> str:
        """One line: what the number is, its unit and direction; it also tells metrics apart."""
        ...

    def bind(self, run: Resumable, target: Resumable) -> Readout:
        """A readout of ``run``; ``target`` is the unpatched run that patches go into."""
        ...


METRICS_OF_PATCH: Registry[Any] = Registry("patching metric")


@METRICS_OF_PATCH.register("massive_coordinate")
@dataclass(frozen=True)
class MassiveCoordinate:
    """The massive coordinate of the first token, where it is largest."""

    me_layer: MELayer
    name: str = "massive_coordinate"

    def __post_init__(self) -> None:
        _check_located(self.me_layer, self.name)

    @property
    def about(self) -> str:
        """What it is."""
        return (
            f"residual after layer {self.me_layer.peak_layer}, first token, dimension "
            f"{self.me_layer.massive[0].dim}"
        )

    def bind(self, run: Resumable, target: Resumable) -> Readout:
        """Stops after the peak layer, and looks at the first token alone."""
        peak = self.me_layer.peak_layer
        return CoordinateReadout(
            run, -1 if peak is None else peak, dim=self.me_layer.massive[0].dim
        )


@METRICS_OF_PATCH.register("sink_rate")
@dataclass(frozen=True)
class SinkRate:
    """Share of the heads after the ME Layer that have a sink on the first token."""

    me_layer: MELayer
    eps: float = SINK_EPS
    name: str = "sink_rate"

    def __post_init__(self) -> None:
        _check_located(self.me_layer, self.name)

    @property
    def about(self) -> str:
        """What it is."""
        return (
            f"share of (layer, head) after the ME Layer ({self.me_layer.me_layer}) whose mean "
            f"attention to the first token, over all real queries, exceeds {self.eps}"
        )

    def bind(self, run: Resumable, target: Resumable) -> Readout:
        """Reads one column of every later pattern."""
        after = -1 if self.me_layer.me_layer is None else self.me_layer.me_layer
        parts = anatomy(run.model)
        layers = [i for i in parts.attention_layers if i > after]
        if not layers:
            why = "" if parts.attention_layers else f" ({parts.why_no_attention()})"
            raise ModelError(
                f"no layer after the ME Layer ({after}) has attention that can be read{why}, so "
                "there is no sink rate; choose another metric."
            )
        return SinkReadout(run, layers, self.eps)


@METRICS_OF_PATCH.register("logit_difference")
@dataclass(frozen=True)
class LogitDifference:
    """Logit of the answer minus logit of a wrong answer, after each row's last token."""

    answer: Token | Sequence[Token]
    wrong: Token | Sequence[Token]
    name: str = "logit_difference"

    def __post_init__(self) -> None:
        if self.answer == self.wrong:
            raise MetricError(f"answer and wrong are both {self.answer!r}: they cannot differ.")

    @property
    def about(self) -> str:
        """What it is."""
        return f"logit of {self.answer!r} minus logit of {self.wrong!r} after the last token"

    def bind(self, run: Resumable, target: Resumable) -> Readout:
        """Needs the logits of one position a row."""
        return DifferenceReadout(
            run, _token_ids(run, self.answer, "answer"), _token_ids(run, self.wrong, "wrong")
        )


@METRICS_OF_PATCH.register("kl")
@dataclass(frozen=True)
class KL:
    """How far the next-token distribution moves from that of the unpatched target run."""

    name: str = "kl"

    @property
    def about(self) -> str:
        """What it is, direction included."""
        return "KL(unpatched target run || patched run) after the last token, nats"

    def bind(self, run: Resumable, target: Resumable) -> Readout:
        """Needs the logits of one position a row."""
        return DivergenceReadout(run, target)


@METRICS_OF_PATCH.register("loss")
@dataclass(frozen=True)
class Loss:
    """Mean negative log-likelihood of a row's next tokens."""

    name: str = "loss"

    @property
    def about(self) -> str:
        """What it is."""
        return "mean next-token negative log-likelihood over a row's real tokens, nats"

    def bind(self, run: Resumable, target: Resumable) -> Readout:
        """Needs every position's logits from the patch on."""
        return LossReadout(run)


@dataclass(frozen=True)
class Own:
    """A function of the whole logits, ``[rows, pos, vocab] -> [rows]``.

    It gets the logits at padding too, which mean nothing and are not kept up to date.
    """

    function: Callable[[Tensor], Tensor]

    @property
    def name(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def about(self) -> str:
        """The function's name, and a mark that changes with its code."""
        code = getattr(self.function, "__code__", None)
        mark = repr((code.co_code, code.co_consts, code.co_names)) if code else repr(self.function)
        return f"{self.name} ({digest([mark], length=8)})"

    def bind(self, run: Resumable, target: Resumable) -> Readout:
        """Needs all logits of all positions."""
        return OwnReadout(run, self.function)


def metric_of(given: object) -> PatchMetric:
    """The metric that a name, a function or a ready one stands for.

    Raises:  UnknownNameError: no metric of that name. MetricError: one that needs arguments.
    """
    if isinstance(given, str):
        kind = METRICS_OF_PATCH[given]
        if any(field.default is MISSING for field in fields(kind)):
            raise MetricError(
                f"metric '{given}' needs to know more; pass "
                f"melens.patching.{getattr(kind, '__name__', given)}(...), e.g. "
                "LogitDifference(' Paris', ' Rome') or MassiveCoordinate(melens.locate(model))."
            )
        return kind()
    if isinstance(given, PatchMetric):
        return given
    if callable(given):
        return Own(cast(Callable[[Tensor], Tensor], given))
    raise MetricError(
        f"metric must be a name ({', '.join(METRICS_OF_PATCH)}), one of melens.patching's metrics "
        f"or a function of logits, got {type(given).__name__}."
    )


def _check_located(me_layer: object, name: str) -> None:
    if not isinstance(me_layer, MELayer) or not me_layer.massive:
        raise MetricError(
            f"{name} needs a MELayer with a massive token (melens.locate); got "
            f"{'one without any' if isinstance(me_layer, MELayer) else type(me_layer).__name__}."
        )


def _token_ids(run: Resumable, given: Token | Sequence[Token], name: str) -> Tensor:
    """One token id a row of the batch."""
    rows = len(run.batch)
    tokens = [given] * rows if isinstance(given, (int, str)) else list(given)
    if len(tokens) != rows:
        raise MetricError(
            f"{name} has {len(tokens)} tokens for {rows} sequences; give one, or one a sequence."
        )
    ids = [_token_id(run.model, token, name) for token in tokens]
    return torch.tensor(ids, device=run.batch.ids.device)


def _token_id(model: HookedModel, token: Token, name: str) -> int:
    if isinstance(token, int):
        return _known(model, token, name)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise MetricError(f"this model has no tokenizer for {name}={token!r}; give a token id.")
    ids = plain_ids(tokenizer, token)
    if len(ids) != 1:
        parts = [tokenizer.decode([i]) for i in ids]
        raise MetricError(
            f"{name}={token!r} is {len(ids)} tokens ({parts}); give one of a single token (a "
            "leading space often matters), or a token id."
        )
    return _known(model, ids[0], name)


def _known(model: HookedModel, token: int, name: str) -> int:
    """The id, which the model has an embedding for; a tokenizer may have more than it."""
    if not 0 <= token < model.cfg.d_vocab:
        raise MetricError(
            f"{name} token {token} is outside the vocabulary, 0 to {model.cfg.d_vocab - 1}."
        )
    return token
