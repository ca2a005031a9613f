"""WeMask: weaken the massive token where attention reads it, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from melens.errors import InterventionError
from melens.formatting import brief
from melens.interventions.context import pass_of
from melens.interventions.core import (
    EditedTokens,
    LayerSpan,
    Place,
    as_index,
    check_number,
    editing_inputs,
    intervention,
)
from melens.interventions.target import Tokens, require_located_here
from melens.models.decoder import Decoder, decoder_of
from melens.protocols import AnyModel
from melens.results.locate import MELayer

Layers = str | Sequence[int]
"""``"after"`` = every layer with attention after the ME Layer, ``"next"`` = the first of them, or
layer numbers from 0."""
SELECTS = ("gamma", "activation", "product", "random", "bottom", "bottom-gamma")


@dataclass
class MaskRecord:
    """What a mask did: where, in which dimensions, and how much of the token's energy that was."""

    layers: tuple[int, ...]
    rate: float
    strength: float
    select: str
    edited: EditedTokens = field(default_factory=EditedTokens)
    """How many tokens, in how many rows, and how massive they were."""
    dims: dict[int, tuple[int, ...]] = field(default_factory=dict, repr=False)
    """Layer -> masked dimensions; for rules that read the activation those of the last token."""
    _shares: dict[int, LayerSpan] = field(default_factory=dict, repr=False)

    @property
    def energy(self) -> dict[int, float]:
        """Layer -> mean share of the token's squared norm that lay in the masked dimensions, from
        0 to 1, before the strength is applied; empty until a pass held the token.
        """  # noqa: D205
        return {layer: seen.mean or 0.0 for layer, seen in self._shares.items()}

    @property
    def mean_energy(self) -> float | None:
        """Over the masked layers; None until a pass held the token."""
        shares = self.energy
        return sum(shares.values()) / len(shares) if shares else None

    def note(self, layer: int, rows: Tensor, chosen: Tensor) -> None:
        """Take in one pass: rows ``[token, d_model]`` and the masked dimensions of each."""
        self.dims[layer] = tuple(torch.nonzero(chosen[-1])[:, 0].tolist())
        size = rows.detach().square()
        share = (size * chosen).sum(-1) / size.sum(-1).clamp_min(torch.finfo(size.dtype).tiny)
        self._shares.setdefault(layer, LayerSpan()).take(share.mean())


@intervention(
    "wemask", neutral={"rate": 0.5, "strength": 0.0}, strong={"rate": 0.5, "select": "activation"}
)
@contextmanager
def wemask(  # noqa: PLR0913 (the method's own settings)
    model: AnyModel,
    layer: int | MELayer | None = None,
    *,
    layers: Layers = "after",
    rate: float,
    strength: float = 1.0,
    select: str = "gamma",
    seed: int = 0,
    tokens: Tokens = None,
) -> Iterator[MaskRecord]:
    """Scale the top dimensions of the massive token in the attention input of later layers.

    x_d <- (1 - strength) x_d in int(rate x d_model) dimensions, after the norm and before the
    projections to queries, keys and values. Residual stream and FFN are not touched.

    Args:    model: a TransformerBridge, or a plain transformers model (or PEFT around one): its
             ``generate``, pipelines, lm-eval and trainers then see the mask. Nothing is replaced.
             layer: a located ME Layer or its number, from 0 (-1 = the embedding); only needed for
             ``layers="after"`` and ``"next"``, and for located tokens.
             layers: see ``Layers``.
             rate: share of the residual's dimensions, 0 to 1; 0 changes nothing.
             strength: 0 changes nothing, 1 sets them to zero.
             select: largest ``gamma`` (the norm's |gain|; static, as the paper says), largest
             ``activation`` (|norm output| of the token; as the paper's code does), ``product`` of
             the two, ``random`` (by ``seed``); and as controls the smallest: ``bottom`` of the
             |activation|, ``bottom-gamma`` of the |gain|.
             tokens: None = the located massive tokens, or the first token without a located layer.
    Yields:  a MaskRecord, which knows the masked energy after the first pass.
    Raises:  SiteError: no such layer, or no gain to go by. InterventionError: settings that cannot
             be meant; at the end, if no pass held a chosen token. ResultError: a ME Layer of
             another model (of other sizes, where ``model`` is a plain one).
    Source:  "A Single Layer to Explain Them All" (arXiv 2605.08504), WeMask, and its released
             code, whose rule ``activation`` is: exact there for one sequence without a cache. Here
             dimensions are chosen token by token, so that company and padding change nothing.
    """
    check_mask(rate=rate, strength=strength, select=select, seed=seed)
    decoder = decoder_of(model)
    require_located_here(decoder, layer, tokens)
    chosen_layers = layers_of(decoder, layer, layers)
    first = chosen_layers[0]
    place = Place.at(decoder.model, first, layer, tokens, known=first - 1, blocks=decoder.blocks)
    rule = _rule(decoder, chosen_layers, rate=rate, select=select, seed=seed)
    record = MaskRecord(chosen_layers, rate, strength, select, place.edited)

    def edit(at: int, rows: Float[Tensor, "token d_model"]) -> Tensor:
        masked = rule(at, rows)
        if not pass_of(decoder.model).again:
            record.note(at, rows, masked)
        return torch.where(masked, rows * (1 - strength), rows)

    with editing_inputs(place, {at: decoder.inputs[at] for at in chosen_layers}, edit):
        yield record


def check_mask(*, rate: object, strength: object, select: object, seed: object = 0) -> None:
    """Refuse settings of a mask before any model is needed.

    Raises:  InterventionError: naming the setting and what would fit.
    """
    for name, value in (("rate", rate), ("strength", strength)):
        if not 0 <= check_number(name, value, low=0.0) <= 1:
            raise InterventionError(f"{name} must be from 0 to 1, got {brief(value, 40)}.")
    if select not in SELECTS:
        raise InterventionError(
            f"select must be one of {', '.join(SELECTS)}, got {brief(select, 40)}."
        )
    if as_index(seed) is None:
        raise InterventionError(f"seed must be a whole number, got {brief(seed, 40)}.")


def layers_of(decoder: Decoder, layer: int | MELayer | None, layers: Layers) -> tuple[int, ...]:
    """The layers that a mask acts in, in order.

    Raises:  SiteError: a layer the model does not have. InterventionError: none is left, one has
             no attention, or the ME Layer is not known.
    """
    if layers in ("after", "next"):
        start = _me_layer(decoder, layer, str(layers))
        found = tuple(at for at in decoder.inputs if at > start)
        if not found:
            if unread := [str(at) for at in decoder.unread if at > start]:
                raise InterventionError(
                    f"the attention of layer {', '.join(unread)} cannot be edited here, "
                    "no module of it is known."
                )
            raise InterventionError(
                f"no layer with attention comes after layer {start} of {decoder.name}; name layers."
            )
        return found[:1] if layers == "next" else found
    wanted = [] if isinstance(layers, str) else [as_index(at) for at in layers]
    if not wanted or None in wanted:
        raise InterventionError(
            f"layers must be 'after', 'next' or layer numbers from 0, got {brief(layers)}."
        )
    numbers = sorted({at for at in wanted if at is not None})
    for at in numbers:
        decoder.check_layer(at)
        if at not in decoder.inputs:
            has = "attention that cannot be edited here" if at in decoder.unread else "no attention"
            raise InterventionError(f"layer {at} of {decoder.name} has {has}; it cannot be masked.")
    return tuple(numbers)


def _me_layer(decoder: Decoder, layer: int | MELayer | None, layers: str) -> int:
    if isinstance(layer, MELayer):
        if layer.me_layer is None:
            raise InterventionError(
                f"{layer.run.model} has no ME Layer ({layer.verdict}), so nothing comes {layers} "
                "it; name layers."
            )
        return layer.me_layer
    number = as_index(layer)
    if number is None:
        raise InterventionError(
            f"layers={layers!r} is counted from the ME Layer: pass what melens.locate returns, or "
            f"its number, as the second argument (got {brief(layer, 40)})."
        )
    if number != -1:
        decoder.check_layer(number)
    return number


def least_rate(size: int) -> float:
    """A rate that is one of ``size`` dimensions at least, of a few digits."""
    digits = len(str(size)) + 1
    return math.ceil(10**digits / size) / 10**digits


Rule = Callable[[int, Tensor], Tensor]


def _rule(decoder: Decoder, layers: Sequence[int], *, rate: float, select: str, seed: int) -> Rule:
    """(layer, rows [token, d_model]) -> masked dimensions of each row, bool."""
    size = decoder.d_model
    count = int(rate * size)
    if rate > 0 and not count:
        raise InterventionError(
            f"rate {rate:g} of {size} dimensions is none; it must be at least {least_rate(size):g}."
        )
    gains = {}
    if select in ("gamma", "product", "bottom-gamma"):
        gains = {at: decoder.gain(at).abs() for at in layers}
    if select == "random":
        rng = torch.Generator().manual_seed(int(seed))
        # Drawn for every layer of the model: a layer's dims do not depend on which others are.
        drawn = [torch.rand(size, generator=rng) for _ in range(decoder.n_layers)]
        gains = {at: drawn[at] for at in layers}

    def rule(at: int, rows: Tensor) -> Tensor:
        score = rows.detach().abs()
        if at in gains:
            known = gains[at].to(rows)
            score = score * known if select == "product" else known.expand_as(rows)
        top = score.topk(count, dim=-1, largest=not select.startswith("bottom")).indices
        return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, top, True)

    return rule
