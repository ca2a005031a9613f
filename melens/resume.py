"""Run a model from the middle: a clean run is recorded, then the blocks from l on are called.

TransformerLens's ``start_at_layer`` runs the earlier blocks all the same. Here they are not run:
each block is called with the arguments it had in the clean run and an edited residual; the final
norm, the unembedding and the cap on the logits follow. A change at position p leaves all earlier
positions as they were, so only the suffix from p on is computed, against the keys and values that
the clean run kept. Hooks of the blocks fire as ever, so interventions and readers act.

A model whose blocks do not run by themselves (each reads what others left elsewhere), or whose head
is more than a norm and a matrix, is run whole instead, the edited residual put in where it belongs:
the same numbers, for the price of the whole model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn

from melens.batches import Batch
from melens.capture import (
    EverythingSeen,
    Hooks,
    evaluating,
    fit_ids,
    hooked,
    one_thread,
    require_this_thread,
)
from melens.errors import ContractError, SiteError
from melens.interventions.context import PassTokens, passing, reads_whole
from melens.models.anatomy import anatomy, residual_dtype
from melens.models.decoder import Keeping, RecordedPrefix
from melens.models.origin import origin_of
from melens.placement import called_there, input_device
from melens.protocols import Args, Called, HookedModel, Kwargs
from melens.shapes import Resid

CACHES = ("past_key_values", "layer_past")
"""Names under which a block takes its key-value cache."""
TOLERANCE = {torch.float32: 2e-5, torch.float64: 2e-5}
HALF_TOLERANCE = 5e-2
"""Relative to a token's largest entry; bf16 adds in steps of 2^-8 and matmuls of other shapes add
in another order, once a block. Float64 models, too, have norms and softmax that go through float32.
"""
NUDGE = 1.5
"""Factor by which the check edits a residual: visible, and still ordinary."""
DOES_NOT_FIT = (RuntimeError, ValueError, IndexError, TypeError, AttributeError)
"""What a block raises where its arguments do not fit each other; melens' own errors are others."""
Ways = tuple[bool, bool]
"""Whether the model is run whole where its blocks, and its head, do not run by themselves."""


class Resumable:
    """One batch's clean run, kept so that it can be resumed at any layer and position.

    ``P`` variants of the batch run at once: residuals are ``[P * b, chunk, d_model]``, variant by
    variant, ``b`` the rows of the batch and ``chunk`` its positions from ``start`` on. Memory kept:
    every layer's residual (on the device of the token ids), keys and values (on the layer's own).

    Interventions that are active when this is made are part of the clean run; those entered later
    act on what is resumed, but not on the prefix before ``start``.
    """

    @torch.no_grad()
    def __init__(self, model: HookedModel, batch: Batch, *, ways: Ways | None = None) -> None:
        """Record the clean run, and check that resuming gives the same numbers.

        Args:    model: a TransformerBridge or HookedTransformer; never moved.
                 batch: token ids, padded on either side or not at all.
                 ways: an earlier batch's of the same model: whole sequences, no check (three runs).
        Raises:  ContractError: resumed runs differ from the full one, so this model cannot be
                 resumed. PromptError: token ids that the model does not have.
        """
        batch = fit_ids(model, batch)
        self.model = model
        self.batch = batch.to(input_device(model))
        self.n_layers: int = model.cfg.n_layers
        self._names = [_parameters(block) for block in model.blocks]
        self._calls: list[Kwargs] = []
        self._resids: list[Tensor] = []
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._per_row: dict[str, bool] = {}
        self.whole_blocks, self.whole_head = ways or (False, False)
        self.suffixes = ways is None and self._can_cut() and not reads_whole(model)
        """Whether runs can start after position 0; else every run takes whole sequences."""
        with one_thread(model), evaluating(model):
            last = self._record_what_can_be()
            self._per_row = self._which_are_per_row()
            if ways is None:
                self._check(last)

    @property
    def ways(self) -> Ways:
        """What this batch's check found, for later batches of the same model."""
        return self.whole_blocks, self.whole_head

    def resid_pre(self, layer: int) -> Resid:
        """The clean residual entering ``layer``; ``n_layers`` = what leaves the last block.

        Raises:  SiteError: no such layer.
        """
        if not 0 <= layer <= self.n_layers:
            raise SiteError(
                f"layer {layer} is outside 0..{self.n_layers} (the last one: the final residual)."
            )
        return self._resids[layer]

    @torch.no_grad()
    def block(
        self, layer: int, resid: Resid, *, start: int = 0, notes: dict[object, Tensor] | None = None
    ) -> Resid:
        """One block over the positions from ``start`` on; the model must be in eval mode.

        Args:    resid: ``[P * b, pos - start, d_model]``, as it enters the block.
                 notes: one dict for the blocks of one run, where open edits keep what they need of
                 earlier blocks; rows that join the run later come after the others.
        Raises:  SiteError: rows or positions that do not fit the recorded batch.
        """
        if self.whole_blocks:
            return self._whole(resid, layer, layer + 1)[0]
        with passing(self.model, self._now(self._copies(resid, start), start, notes)):
            return self._block(layer, resid, start)

    def _now(self, copies: int, start: int, notes: dict[object, Tensor] | None) -> PassTokens:
        """What a run over these rows looks at; what it does not run is as recorded."""
        keys = self.batch.positions.repeat(copies, 1)
        ids = self.batch.ids[:, start:].repeat(copies, 1)
        return PassTokens(
            ids,
            keys[:, start:],
            keys,
            lambda layer: self._resids[layer + 1][:, start:],
            {} if notes is None else notes,
        )

    def _block(self, layer: int, resid: Resid, start: int) -> Resid:
        copies = self._copies(resid, start)
        named = {
            name: self._fitted(name, value, start, copies)
            for name, value in self._calls[layer].items()
        }
        if start:
            cache = next(name for name in CACHES if name in self._names[layer])
            named[cache] = RecordedPrefix(self._pairs[layer], start, copies)
        out = self.model.blocks[layer](resid, **named)
        return (out[0] if isinstance(out, tuple) else out).to(resid.device)

    @torch.no_grad()
    def run(
        self,
        layer: int,
        resid: Resid,
        *,
        start: int = 0,
        upto: int | None = None,
        hooks: Hooks = (),
    ) -> Resid:
        """Run the blocks ``layer`` to ``upto - 1`` on an edited residual.

        Args:    layer: the first block to run. ``layer == upto`` runs none.
                 resid: ``[P * b, pos - start, d_model]``, as it enters ``layer``.
                 start: the first position that ``resid`` holds; before it all is as recorded.
                 upto: None = all blocks.
                 hooks: TransformerLens hooks (name, function) to register for this run alone.
        Returns: the residual that leaves the last block run, from ``start`` on.
        Raises:  SiteError: a layer, rows or positions that do not fit.
        """
        self.resid_pre(layer)
        stop = self.n_layers if upto is None else upto
        self.resid_pre(stop)
        now = self._now(self._copies(resid, start), start, None)
        if self.whole_blocks and layer < stop:
            with hooked(self.model, hooks), evaluating(self.model):
                return self._whole(resid, layer, stop)[0]
        with (
            hooked(self.model, hooks),
            evaluating(self.model),
            passing(self.model, now),
        ):
            for current in range(layer, stop):
                resid = self._block(current, resid, start)
        return resid

    @torch.no_grad()
    def logits(self, resid: Resid) -> Float[Tensor, "batch pos d_vocab"]:
        """Final norm, unembedding and the model's own cap or scale on the logits.

        Give it only the positions whose logits are wanted: the unembedding is expensive.
        """
        if self.whole_head:
            return self._whole_logits(resid)
        final = called_there(self.model.ln_final, resid)
        logits = called_there(self.model.unembed, final).to(resid.device)
        adapter = getattr(self.model, "adapter", None)
        transform = getattr(adapter, "apply_output_logits_transform", None)
        if transform is not None:
            return transform(logits)
        cap = getattr(self.model.cfg, "output_logits_soft_cap", None)
        return cap * torch.tanh(logits / cap) if cap is not None and cap > 0 else logits

    def _whole(self, resid: Tensor, layer: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """The whole model with a residual put in before a block (behind the last one where there is
        none): what enters block ``stop`` then, and the logits where all blocks were run.
        """  # noqa: D205
        blocks, name = list(self.model.blocks), self._names[0][0]
        seen: list[Tensor] = []

        def put_in(module: nn.Module, args: Args, kwargs: Kwargs) -> Called:
            require_this_thread(self.model)
            if name in kwargs:
                return args, {**kwargs, name: resid}
            return (resid, *args[1:]), kwargs

        def put_behind(module: nn.Module, args: Args, out: Tensor | tuple[Tensor, ...]) -> object:
            require_this_thread(self.model)
            return (resid, *out[1:]) if isinstance(out, tuple) else resid

        def stop_here(module: nn.Module, args: Args, out: Tensor | tuple[Tensor, ...]) -> None:
            seen.append((out[0] if isinstance(out, tuple) else out).detach().to(resid.device))
            if stop < self.n_layers:
                raise EverythingSeen

        if layer < self.n_layers:
            handles = [blocks[layer].register_forward_pre_hook(put_in, with_kwargs=True)]
        else:
            handles = [blocks[-1].register_forward_hook(put_behind)]
        handles.append(blocks[stop - 1].register_forward_hook(stop_here))
        logits = None
        try:
            with one_thread(self.model):
                logits = self._full(copies=len(resid) // len(self.batch))
        except EverythingSeen:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen[-1], logits

    def _whole_logits(self, resid: Tensor) -> Tensor:
        """What the head makes of any tokens: they stand in for those of the batch, as many as it
        holds at a time.
        """  # noqa: D205
        shape, flat = self.batch.ids.shape, resid.reshape(-1, resid.shape[-1])
        made = []
        for part in flat.split(shape.numel()):
            room = part.new_zeros(shape.numel(), part.shape[-1])
            room[: len(part)] = part
            logits = self._whole(room.view(*shape, -1), self.n_layers, self.n_layers)[1]
            assert logits is not None
            made.append(logits.reshape(-1, logits.shape[-1])[: len(part)])
        return torch.cat(made).reshape(*resid.shape[:-1], -1)

    def _can_cut(self) -> bool:
        """Every block has attention, and takes a cache that the keys can go through."""
        attention = all(block.attention for block in anatomy(self.model).blocks)
        return attention and all(set(names) & set(CACHES) for names in self._names)

    def _record_what_can_be(self) -> Tensor:
        if not self.suffixes:
            return self._record()
        try:
            last = self._record()
        except (AttributeError, TypeError):  # a block that asks more of its cache than we offer
            self.suffixes = False
            return self._record()
        width = self.batch.ids.shape[1]
        self.suffixes = len(self._pairs) == self.n_layers and all(
            x.ndim == 4 and x.shape[-2] == width for pair in self._pairs for x in pair
        )
        return last

    def _record(self) -> Tensor:
        """One full run; returns the logits at each row's last real position."""
        self._calls, self._resids, self._pairs = [], [], []
        kept: list[Keeping] = []

        def keep(resid: Tensor) -> None:
            self._resids.append(resid.detach().to(self.batch.ids.device))

        def before(layer: int) -> Callable[..., object]:
            def note(module: nn.Module, args: Args, kwargs: Kwargs) -> Called:
                named = {**dict(zip(self._names[layer], args, strict=False)), **kwargs}
                require_this_thread(self.model)
                resid = named.pop(self._names[layer][0])
                keep(resid)
                self._calls.append(named)
                if not self.suffixes:
                    return None
                kept.append(Keeping())
                cache = next(name for name in CACHES if name in self._names[layer])
                return (resid,), {**named, cache: kept[-1]}

            return note

        def after(module: nn.Module, args: Args, out: Tensor | tuple[Tensor, ...]) -> None:
            keep(out[0] if isinstance(out, tuple) else out)

        blocks = list(self.model.blocks)
        handles = [
            block.register_forward_pre_hook(before(layer), with_kwargs=True)
            for layer, block in enumerate(blocks)
        ]
        handles.append(blocks[-1].register_forward_hook(after))
        try:
            logits = self._full()
        finally:
            for handle in handles:
                handle.remove()
        self._pairs = [cache.pair for cache in kept if cache.pair is not None]
        return logits[torch.arange(len(logits)), self._last()]

    def _full(self, copies: int = 1) -> Tensor:
        options: dict[str, object] = {}
        if self.batch.padded:
            options["attention_mask"] = self.batch.mask.long().repeat(copies, 1)
        if hasattr(self.model, "original_model"):
            options["use_cache"] = False
        return self.model(self.batch.ids.repeat(copies, 1), return_type="logits", **options)

    def _which_are_per_row(self) -> dict[str, bool]:
        """For each tensor that blocks are called with, whether its first axis grows with the rows.

        Masks, positions and biases are built again for every batch, and no shape tells how: the
        axis may be rows, rows x heads, or heads alone. So the model is called once more with every
        row twice, up to the first block that shows all of them.
        """
        once = _sizes(self._calls)
        found: dict[str, int] = {}

        def look(layer: int) -> Callable[..., object]:
            def note(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
                named = dict(zip(self._names[layer], args, strict=False))
                for name, size in _sizes([{**named, **kwargs}]).items():
                    found.setdefault(name, size)
                if set(once) <= set(found):
                    raise EverythingSeen

            return note

        handles = [
            block.register_forward_pre_hook(look(layer), with_kwargs=True)
            for layer, block in enumerate(self.model.blocks)
        ]
        try:
            self._full(copies=2)
        except EverythingSeen:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return {name: found.get(name) == 2 * size for name, size in once.items()}

    def _check(self, last: Tensor) -> None:
        """Two variants: as it was, and edited; whole and, if it can, the suffix. All blocks: an
        edit that is active in any of them must act as in the full run.
        """  # noqa: D205
        if len(self._resids) != self.n_layers + 1:
            self._refuse(f"its {self.n_layers} blocks ran {len(self._resids) - 1} times")
        layer, start = 0, self.batch.ids.shape[1] // 2
        clean = self._resids[layer]
        edited = clean.clone()
        edited[:, start:] *= NUDGE
        both = torch.cat([clean, edited])
        wrong, whole = self._blocks_wrong(both)
        if wrong:
            self.whole_blocks, self.suffixes = True, False
            again, whole = self._blocks_wrong(both)
            if again:
                self._refuse(wrong)
        if wrong := self._head_wrong(last):
            self.whole_head = True
            if self._head_wrong(last):
                self._refuse(wrong)
        if self.suffixes and start:
            try:
                cut = self.run(layer, both[:, start:], start=start)
            except torch.OutOfMemoryError:
                raise
            except DOES_NOT_FIT:  # what it is called with cannot be cut: whole sequences then
                self.suffixes = False
                return
            self.suffixes = self._miss(cut, whole[:, start:], start) <= self._tolerance

    def _blocks_wrong(self, both: Tensor) -> tuple[str, Tensor]:
        """What is wrong with resumed blocks, if anything is; and what they give."""
        if not self.whole_blocks and any(_holds_tensors(call) for call in self._calls):
            return "its blocks leave tensors to each other in an argument", both
        try:
            whole = self.run(0, both)
        except torch.OutOfMemoryError:
            raise
        except DOES_NOT_FIT as error:
            return f"its blocks do not run by themselves ({str(error)[:120]})", both
        miss = self._miss(whole[: len(both) // 2], self._resids[-1])
        wrong = f"resumed at layer 0 it misses the full run by {miss:.1e}"
        return (wrong if miss > self._tolerance else ""), whole

    def _head_wrong(self, last: Tensor) -> str:
        final = self._resids[-1]
        ends = final[torch.arange(len(final)), self._last()][:, None]
        try:
            miss = _largest_miss(self.logits(ends)[:, 0], last)
        except torch.OutOfMemoryError:
            raise
        except DOES_NOT_FIT as error:
            return f"its head does not run by itself ({str(error)[:120]})"
        wrong = f"its logits miss those of the full run by {miss:.1e}"
        return wrong if miss > self._tolerance else ""

    def _miss(self, found: Tensor, expected: Tensor, start: int = 0) -> float:
        real = self.batch.mask[:, start:].repeat(len(found) // len(self.batch), 1)
        return _largest_miss(found[real], expected[real])

    @property
    def _tolerance(self) -> float:
        return TOLERANCE.get(residual_dtype(self.model), HALF_TOLERANCE)

    def _refuse(self, what: str) -> NoReturn:
        raise ContractError(
            f"{origin_of(self.model).name} cannot be resumed from the middle: {what}. If hooks are "
            "active on the model, leave them first; else this family needs the full run."
        )

    def _last(self) -> Tensor:
        """Each row's last real column."""
        return self.batch.positions.argmax(dim=1)

    def _copies(self, resid: Tensor, start: int) -> int:
        rows, width = self.batch.ids.shape
        if start and not self.suffixes:
            raise SiteError(
                f"{origin_of(self.model).name} resumes whole sequences only; start at 0, not "
                f"{start} (Resumable.suffixes says so)."
            )
        if resid.ndim != 3 or len(resid) % rows or resid.shape[1] != width - start:
            raise SiteError(
                f"a residual from position {start} on must be [P * {rows}, {width - start}, "
                f"d_model], got {tuple(resid.shape)}."
            )
        return len(resid) // rows

    def _fitted(self, name: str, value: object, start: int, copies: int) -> object:
        """A recorded argument, for these rows and positions."""
        if isinstance(value, tuple):
            parts = enumerate(value)
            return tuple(self._fitted(f"{name}.{i}", item, start, copies) for i, item in parts)
        if not isinstance(value, Tensor):
            return value
        if start:
            value = _cut(name.split(".")[0], value, start)
        if self._per_row.get(name):
            value = value.repeat(copies, *[1] * (value.ndim - 1))
        return value


def _cut(name: str, value: Tensor, start: int) -> Tensor:
    """The part of an argument that is about the positions from ``start`` on."""
    if name == "attention_mask":
        return value[..., start:, :] if value.ndim > 2 else value
    if name == "position_embeddings":
        return value[..., start:, :]
    return value[..., start:] if name in ("position_ids", "cache_position") else value


def _sizes(calls: Iterable[Kwargs]) -> dict[str, int]:
    """Length of the first axis of every tensor in blocks' arguments, by its name."""
    found: dict[str, int] = {}
    for call in calls:
        for name, value in call.items():
            parts = enumerate(value) if isinstance(value, tuple) else [("", value)]
            for i, part in parts:
                if isinstance(part, Tensor) and part.ndim:
                    found.setdefault(f"{name}.{i}".rstrip("."), len(part))
    return found


def _holds_tensors(call: Kwargs) -> bool:
    """Whether an argument is a dict that blocks put tensors into for later ones (shared keys)."""
    held = (value.values() for value in call.values() if isinstance(value, Mapping))
    parts = (item if isinstance(item, tuple) else (item,) for values in held for item in values)
    return any(isinstance(part, Tensor) for group in parts for part in group)


def _parameters(block: nn.Module) -> list[str]:
    """Names of a block's arguments in order, the residual first."""
    inner = getattr(block, "original_component", None) or block
    return list(inspect.signature(inner.forward).parameters)


def _largest_miss(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to each row's own largest entry."""
    found, expected = found.float(), expected.float()
    scale = expected.abs().amax(-1).clamp_min(1e-12)
    miss = ((found - expected).abs().amax(-1) / scale).max().item()
    return miss if miss == miss else float("inf")  # NaN compares as no miss at all
