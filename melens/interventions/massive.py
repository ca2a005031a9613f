"""Which tokens of a forward pass are massive: read off the residual where they emerge, not off ids.

A token's id says nothing of a later position: a newline may be massive in one context and ordinary
in the next. What ``locate`` saw at the ME Layer's output gives a limit that any single token can
be compared with, so that cache, padding and the rest of a batch do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from melens.batches import Batch
from melens.capture import EverythingSeen, evaluating, hooked
from melens.errors import InterventionError
from melens.interventions.context import PassTokens, pass_of, watching
from melens.metrics.magnitude import NORM_RATIO, SUN_ABSOLUTE, SUN_RATIO
from melens.models.anatomy import resid_post, resid_pre
from melens.models.decoder import decoder_of
from melens.placement import input_device
from melens.protocols import AnyModel, Args, Kwargs, is_hooked, transformers_of
from melens.results.locate import FirstToken, MassiveToken, MELayer
from melens.shapes import Resid, TokenMask

AT_ONCE = 64
HALF = 0.5
"""Where the located token itself is below a limit of ``locate`` at the ME Layer (a gradual
emergence begins there), half of what it has there is the limit."""


@dataclass(frozen=True)
class MassiveRule:
    """The located rule, for one token at one layer's output.

    Massive is a token with |x[dim]| above ``coordinate`` and a norm of at least ``norm``, both in
    residual units.
    """

    layer: int
    """From 0, at the block output; -1 is the embedding."""
    dim: int
    coordinate: float
    norm: float
    median_norm: float | None
    """Of the located texts' tokens at this layer; None for the embedding."""

    @classmethod
    def of(cls, me_layer: MELayer) -> MassiveRule:
        """The rule of a located ME Layer.

        As in ``locate``: 100 and 1000 times the median |x| for the coordinate (Sun et al. 2024),
        5 times the median norm for the norm; medians are those of the located texts.

        Raises:  InterventionError: nothing massive was located.
        """
        if not me_layer.massive or me_layer.me_layer is None:
            raise InterventionError(
                f"{me_layer.run.model} has no massive token to edit; in Python say which "
                "tokens: 'first', 'all' or positions."
            )
        first, at = me_layer.massive[0], me_layer.me_layer
        own = HALF * abs(first.value) * _share_at(me_layer, at)
        if at < 0:  # no statistics of the embedding are kept
            return cls(at, first.dim, own, 0.0, None)
        row = me_layer.profile[at]
        ratio = min(NORM_RATIO, HALF * row.norm_ratio)
        sun = max(SUN_ABSOLUTE, SUN_RATIO * row.median)
        return cls(at, first.dim, min(sun, own), ratio * row.median_norm, row.median_norm)

    @property
    def site(self) -> str:
        """The hook that shows the residual in question."""
        return resid_pre(0) if self.layer < 0 else resid_post(self.layer)

    def __call__(self, now: PassTokens) -> TokenMask:
        """The massive tokens of a pass, ``[batch, chunk]``; padding may be among them.

        Raises:  InterventionError: the pass has not come to the layer yet.
        """
        return self._over(self.sizes(now))

    def marks(self, x: Resid) -> tuple[TokenMask, Float[Tensor, "2 batch pos"]]:
        """The massive tokens of a residual at the rule's layer; |x[dim]| and norm of all."""
        sizes = self._sizes_of(x)
        return self._over(sizes), sizes

    def _over(self, sizes: Float[Tensor, "2 batch pos"]) -> TokenMask:
        return (sizes[0] > self.coordinate) & (sizes[1] >= self.norm)

    def note(self, x: Tensor, now: PassTokens) -> None:
        """Keep what the rule needs of the residual ``[batch, chunk, d_model]`` for this pass."""
        now.notes[self] = self._sizes_of(x)

    def sizes(self, now: PassTokens) -> Float[Tensor, "2 batch chunk"]:
        """|x[dim]| and norm of every token, in float32 at least.

        Rows that joined a pass after the layer were resumed from a recorded run: its residual is
        theirs.
        """
        noted = now.notes.get(self)
        rows = len(now.positions)
        if noted is not None and noted.shape[1] == rows:
            return noted
        if now.recorded is None:
            raise InterventionError(
                f"which tokens are massive is decided at the output of layer {self.layer}, and "
                "this pass edits before it; name the tokens: 'first' or positions."
            )
        kept = self._sizes_of(now.recorded(self.layer))
        missing = rows - (0 if noted is None else noted.shape[1])
        kept = kept.repeat(1, missing // kept.shape[1], 1)
        return kept if noted is None else torch.cat([noted, kept], dim=1)

    def _sizes_of(self, x: Tensor) -> Float[Tensor, "2 batch chunk"]:
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        return torch.stack([wide[..., self.dim].abs(), wide.norm(dim=-1)])


def _share_at(me_layer: MELayer, at: int) -> float:
    """How much of the primary token's vector at its peak is there at the output of layer ``at``.

    Write shares up to the peak sum to 1 with the embedding's, so what comes after is what lacks.
    """
    peak = at if me_layer.peak_layer is None else me_layer.peak_layer
    later = me_layer.profile[at + 1 : peak + 1]
    return max(0.0, 1.0 - sum(row.write_share or 0.0 for row in later))


@dataclass(frozen=True)
class FirstRule:
    """Massive first tokens, by id: all that can be known before the ME Layer has run.

    Causality makes this exact for ids that were located or tried alone: a first token sees itself
    only. An id that was neither counts where all that were tried are massive.
    """

    known: tuple[tuple[int, bool], ...]
    others: bool

    @classmethod
    def of(cls, me_layer: MELayer) -> FirstRule:
        """What ``locate`` found out about first tokens."""
        MassiveRule.of(me_layer)  # refuses where nothing is massive
        tried = me_layer.stability.first_tokens
        known = {token.token_id: token.massive for token in tried}
        located = [token for token in _primary(me_layer) if token.position == 0]
        known |= {token.token_id: True for token in located}
        others = bool(located and tried) and all(token.massive for token in tried)
        return cls(tuple(sorted(known.items())), others)

    def __call__(self, now: PassTokens) -> TokenMask:
        """First tokens that are massive, ``[batch, chunk]``."""
        start = now.positions == 0
        if self.others and all(massive for _, massive in self.known):
            return start
        ids = _ids(now)
        listed = torch.tensor(
            [i for i, massive in self.known if massive is not self.others], dtype=torch.long
        )
        found = torch.isin(ids, listed.to(ids.device))
        return start & (~found if self.others else found)


@dataclass(frozen=True)
class IdRule:
    """Located ids wherever they stand, massive there or not: only where the caller says so."""

    first: tuple[int, ...]
    later: tuple[int, ...]

    @classmethod
    def of(cls, me_layer: MELayer) -> IdRule:
        """Ids of the primary dimension's massive tokens."""
        MassiveRule.of(me_layer)
        tokens = _primary(me_layer)
        return cls(
            tuple(token.token_id for token in tokens if token.position == 0),
            tuple(token.token_id for token in tokens if token.position > 0),
        )

    def __call__(self, now: PassTokens) -> TokenMask:
        """Tokens of these ids, ``[batch, chunk]``."""
        ids = _ids(now)
        first, later = (
            torch.tensor(x, dtype=torch.long, device=ids.device) for x in (self.first, self.later)
        )
        start = now.positions == 0
        return (start & torch.isin(ids, first)) | (~start & torch.isin(ids, later))


def _primary(me_layer: MELayer) -> list[MassiveToken]:
    """Massive tokens of the primary dimension: what is massive in another has another cause."""
    return [token for token in me_layer.massive if token.dim == me_layer.massive[0].dim]


def _ids(now: PassTokens) -> Tensor:
    if now.ids is None:
        raise InterventionError(
            "these tokens are told by their ids, and the model was called with embeddings; pass "
            "tokens='first' or positions."
        )
    return now.ids


@contextmanager
def noting(
    model: AnyModel,
    rule: MassiveRule | None,
    block: torch.nn.Module | None,
    then: Callable[[PassTokens], None] = lambda now: None,
) -> Iterator[None]:
    """Let a rule see the residual it needs in every pass while this is open; nothing is changed.

    Args:    block: the plain model's block ``rule.layer`` (block 0 for the embedding); a bridge
             has a hook for it.
             then: called once the rule has seen a pass.
    """
    if rule is None:
        yield
        return

    def read(x: Tensor | tuple[Tensor, ...], hook: object = None) -> None:
        now = pass_of(model)
        rule.note(x[0] if isinstance(x, tuple) else x, now)
        then(now)

    if is_hooked(model):
        with hooked(model, [(rule.site, read)]):
            yield
        return
    assert block is not None
    handle = _plain_hook(block, rule, read)
    try:
        yield
    finally:
        handle.remove()


def _plain_hook(
    block: torch.nn.Module, rule: MassiveRule, read: Callable[..., None]
) -> RemovableHandle:
    if rule.layer >= 0:
        return block.register_forward_hook(lambda module, args, out: read(out))

    def before(module: torch.nn.Module, args: Args, kwargs: Kwargs) -> None:
        read(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    return block.register_forward_pre_hook(before, with_kwargs=True)


@torch.no_grad()
def massive_tokens(
    model: AnyModel, me_layer: MELayer, batches: Iterable[Batch]
) -> Iterator[tuple[TokenMask, Float[Tensor, "2 batch pos"]]]:
    """The massive tokens of unedited texts: one pass a batch, up to the ME Layer.

    Args:    model: a bridge or a plain transformers model; never moved.
    Yields:  a batch's massive tokens, and |x| in the massive dimension and the norm of all its
             tokens at the ME Layer's output, in residual units.
    Raises:  InterventionError: nothing massive was located.
    """
    rule, decoder = MassiveRule.of(me_layer), decoder_of(model)
    inner = transformers_of(decoder.model)
    device = input_device(inner)

    def stop(now: PassTokens) -> None:
        raise EverythingSeen

    for batch in batches:
        here = batch.to(device)
        with (
            evaluating(inner),
            watching(decoder.model),
            noting(decoder.model, rule, decoder.blocks.get(max(rule.layer, 0)), stop),
        ):
            with suppress(EverythingSeen):
                inner(here.ids, attention_mask=here.mask.long(), use_cache=False)
            now = pass_of(decoder.model)
            sizes, marks = rule.sizes(now), rule(now)
        yield marks & now.real.to(marks.device), sizes


def with_firsts(model: AnyModel, me_layer: MELayer, ids: Sequence[int]) -> MELayer:
    """The same ME Layer, which also knows of these first tokens whether they are massive.

    Edits that act before the ME Layer's output can only tell first tokens, and those by id.
    """
    known = dict(FirstRule.of(me_layer).known)
    new = sorted({i for i in ids if i not in known})
    batches = [
        Batch.of(torch.tensor(new[i : i + AT_ONCE])[:, None]) for i in range(0, len(new), AT_ONCE)
    ]
    tried = []
    for batch, (marks, sizes) in zip(
        batches, massive_tokens(model, me_layer, batches), strict=True
    ):
        found = zip(
            batch.ids[:, 0].tolist(), marks[:, 0].tolist(), sizes[0, :, 0].tolist(), strict=True
        )
        tried += [
            FirstToken(
                token_id=token, token=f"<{token}>", massive=massive, me_layer=None, value=size
            )
            for token, massive, size in found
        ]
    support = me_layer.stability
    wider = support.model_copy(update={"first_tokens": (*support.first_tokens, *tried)})
    return me_layer.model_copy(update={"stability": wider})
