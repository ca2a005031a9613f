"""A model run as a scheme would run it: what is rounded is rounded where it is read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from melens.batches import Batch
from melens.errors import CaptureError, ModelError
from melens.formatting import brief
from melens.protocols import Args, Kwargs
from melens.quantising.layers import CLOSE, PROBE, LinearWeight, PlainModel
from melens.quantising.rounding import Packed, packed, rounded, scale_of
from melens.quantising.schemes import Grid, Scheme
from melens.shapes import TokenMask

if TYPE_CHECKING:
    from transformers import DynamicCache

CACHE = ".cache"
WHOLE_BITS = 16
"""What engines keep a weight in that is not quantised, whatever it was measured in."""
Entries = Mapping[str, tuple[tuple[int, ...], ...]]
"""Weight's name -> indices into its matrix."""
Largest = dict[str, Float[Tensor, "batch pos"]]
"""Module's name -> the largest |entry| that it reads of every token."""


@dataclass(frozen=True)
class KeptWhole:
    """What stays as it is, in the model's own dtype."""

    tokens: TokenMask | None = None
    """What is read of these tokens, and their keys and values, ``[batch, pos]``."""
    entries: Entries = field(default_factory=dict)
    modules: frozenset[str] = frozenset()
    """Linear layers that are not quantised at all."""
    largest: Mapping[str, float] = field(default_factory=dict)
    """Of a static scheme: linear layer's name -> the largest |entry| that other texts showed."""
    prefix: int = 0
    """First tokens of every row whose keys and values are those of the model as it is."""


@dataclass
class QuantisedModel:
    """A plain model, and its weights as a scheme keeps them. The model itself is never changed."""

    plain: PlainModel
    scheme: Scheme
    packed: dict[str, Packed]

    @classmethod
    def of(cls, plain: PlainModel, scheme: Scheme) -> QuantisedModel:
        """Round all weights once.

        Raises:  ModelError: they do not divide into the scheme's groups or blocks.
        """
        if scheme.weights is None:
            return cls(plain, scheme, {})
        grid = scheme.weights
        return cls(plain, scheme, {one.name: packed(one.matrix, grid) for one in plain.weights})

    def bits(self, entries: Entries, modules: Collection[str]) -> float | None:
        """Mean bits a weight of the linear layers, scales and what is kept whole included."""
        if not self.packed:
            return None
        total = count = 0.0
        for one in self.plain.weights:
            whole = min(WHOLE_BITS, 8 * one.stored.element_size())
            kept = len(entries.get(one.name, ()))
            own = self.packed[one.name].bits
            size = one.stored.numel()
            total += whole * size if one.path in modules else own * size + whole * kept
            count += size
        return total / count

    @torch.no_grad()
    def logits(self, batch: Batch, spared: KeptWhole) -> Float[Tensor, "batch pos vocab"]:
        """One pass as the scheme makes it.

        Raises:  CaptureError: nothing was rounded.
        """
        here, start = batch.to(self.plain.device), spared.prefix
        rest = Batch.of(here.ids[:, start:], here.mask[:, start:])
        now = _Pass(self, rest, spared)
        cache = now.cache() if start or self.scheme.cache else None
        before = [self._prefix(here, start, cache)] if start else []
        with now.hooked():
            found = self.plain.hf(
                here.ids[:, start:],
                attention_mask=here.mask.long(),
                past_key_values=cache,
                use_cache=cache is not None,
            )
        now.require_fired()
        return torch.cat([*before, found.logits], dim=1)

    def _prefix(self, here: Batch, start: int, cache: DynamicCache | None) -> Tensor:
        """Logits of the prefix, and its keys and values into the cache, nothing rounded."""
        mask = here.mask[:, :start].long()
        ids = here.ids[:, :start]
        found = self.plain.hf(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        return found.logits


def require_cache(plain: PlainModel, scheme: Scheme) -> None:
    """Refuse a model whose keys and values cannot be rounded where they are cached.

    Raises:  ModelError: with transformers' reason.
    """
    batch = Batch.of(torch.tensor([PROBE]))
    try:
        QuantisedModel(plain, scheme, {}).logits(batch, KeptWhole())
    except torch.OutOfMemoryError:
        raise
    except (CaptureError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        why = brief(str(error).partition("\n")[0], 160)
        raise ModelError(
            f"keys and values of {type(plain.hf).__name__} cannot be rounded in transformers' "
            f"cache: {why}"
        ) from None


def require_prefix(plain: PlainModel) -> None:
    """Refuse a model that cannot continue the keys and values of a first token.

    Raises:  ModelError: with transformers' reason, or because it answers otherwise.
    """
    batch, name = Batch.of(torch.tensor([PROBE])), type(plain.hf).__name__
    try:
        found = QuantisedModel(plain, Scheme("none"), {}).logits(batch, KeptWhole(prefix=1))
    except torch.OutOfMemoryError:
        raise
    except (CaptureError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        why = brief(str(error).partition("\n")[0], 160)
        raise ModelError(f"{name} cannot continue a prefix: {why}") from None
    whole = unquantised(plain, batch)
    if not float((found - whole).abs().max()) <= CLOSE * float(whole.abs().max()):
        raise ModelError(f"{name} gives other logits after the keys and values of a prefix.")


@torch.no_grad()
def unquantised(plain: PlainModel, batch: Batch) -> Float[Tensor, "batch pos vocab"]:
    """One pass as the model is."""
    here = batch.to(plain.device)
    return plain.hf(here.ids, attention_mask=here.mask.long(), use_cache=False).logits


@torch.no_grad()
def largest_read(plain: PlainModel, batch: Batch) -> Largest:
    """The largest |entry| of each token that every linear layer reads; padding is 0."""
    here, found = batch.to(plain.device), Largest()

    def look(name: str, module: nn.Module, args: Args) -> None:
        if not args or not isinstance(args[0], Tensor):
            return
        x, real = _by_token(args[0], here.mask), here.mask.to(args[0].device)
        # what reads tokens in an order of its own has one size for all of them
        sizes = args[0].float().abs().amax() if x is None else x.float().abs().amax(-1)
        sizes = torch.where(real, sizes, 0.0)
        before = found.get(name)  # some modules run several times a pass
        found[name] = sizes if before is None else torch.maximum(before, sizes)

    handles = [
        module.register_forward_pre_hook(partial(look, name))
        for name, module in _modules(plain.weights).items()
    ]
    try:
        unquantised(plain, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _modules(weights: tuple[LinearWeight, ...]) -> dict[str, nn.Module]:
    return {one.path: one.module for one in weights}


def _by_token(x: Tensor, mask: TokenMask) -> Tensor | None:
    """What a module reads as ``[batch, pos, d]``; None where it reads tokens in its own order."""
    if x.ndim == 4 and x.shape[1] == 1:  # latents of a cache (MLA)
        x = x[:, 0]
    if x.shape[:2] == mask.shape and x.ndim == 3:
        return x
    if x.ndim == 2 and len(x) == mask.numel():
        return x.view(*mask.shape, -1)
    return None


@dataclass
class _Pass:
    """One forward pass: which tokens it has, and what of it stays as it is."""

    model: QuantisedModel
    batch: Batch
    spared: KeptWhole
    fired: set[str] = field(default_factory=set)
    rounding: bool = False
    """Whether the hooks are open: a prefix before them is as it is."""

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on the linear layers' modules, which are of a tree that is the plain model's."""
        handles: list[RemovableHandle] = []
        originals = {
            one.name: one.module._parameters[one.attribute] for one in self.model.plain.weights
        }
        by_module: dict[str, list[LinearWeight]] = {}
        for one in self.model.plain.weights:
            if one.path not in self.spared.modules:
                by_module.setdefault(one.path, []).append(one)
        try:
            for path, weights in by_module.items():
                module = weights[0].module
                enter = partial(self._enter, path, weights)
                leave = partial(self._leave, weights, originals)
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(leave, always_call=True))
            self.rounding = True
            yield
        finally:
            self.rounding = False
            for handle in handles:
                handle.remove()
            self._put_back(self.model.plain.weights, originals)

    def _enter(
        self, path: str, weights: list[LinearWeight], module: nn.Module, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs] | None:
        self.fired.add(path)
        for one in weights:
            if one.name in self.model.packed:
                dense = self._dense(one)
                module._parameters[one.attribute] = nn.Parameter(dense, requires_grad=False)
        grid = self.model.scheme.inputs
        if grid is None or not args or not isinstance(args[0], Tensor):
            return None
        return (self._read(path, args[0], grid), *args[1:]), kwargs

    def _dense(self, one: LinearWeight) -> Tensor:
        entries = self.spared.entries.get(one.name)
        if entries is None:
            return one.as_matrix(self.model.packed[one.name].dense(one.stored.dtype))
        at = tuple(torch.tensor(axis) for axis in zip(*entries, strict=True))
        others = one.matrix.clone()
        others[at] = 0.0  # what is kept whole widens no scale
        assert self.model.scheme.weights is not None
        made = packed(others, self.model.scheme.weights).dense(one.stored.dtype)
        made[at] = one.matrix[at]
        return one.as_matrix(made)

    def _leave(
        self,
        weights: list[LinearWeight],
        originals: dict[str, nn.Parameter | None],
        module: nn.Module,
        args: Args,
        out: object,
    ) -> None:
        self._put_back(weights, originals)

    @staticmethod
    def _put_back(
        weights: Sequence[LinearWeight], originals: dict[str, nn.Parameter | None]
    ) -> None:
        for one in weights:
            one.module._parameters[one.attribute] = originals[one.name]

    def _read(self, path: str, x: Tensor, grid: Grid) -> Tensor:
        """What a linear layer reads, rounded; spared tokens neither widen a scale nor change."""
        kept, real = (mask.to(x.device) for mask in self._masks(x.shape[-2]))
        rows = _by_token(x, real)
        if rows is None:  # tokens in an order of the module's own: which they are is not known
            sizes = x.float().abs()
            over = (-1,) if grid.per == "token" else tuple(range(x.ndim))
            return rounded(x, self._scale(path, sizes.amax(over, keepdim=True), grid), grid)
        sizes = rows.float().abs().masked_fill((kept | ~real)[..., None], 0.0)
        over = {"token": (-1,), "text": (-2, -1)}.get(grid.per, (0, 1, 2))
        scale = self._scale(path, sizes.amax(over, keepdim=True), grid)
        made = torch.where(kept[..., None], rows, rounded(rows, scale, grid))
        return made.view_as(x)

    def _masks(self, width: int) -> tuple[Tensor, Tensor]:
        """Kept and real tokens of the pass; of a cache's tokens the prefix's too, which is kept."""
        kept, real, start = self._kept(), self.batch.mask, self.spared.prefix
        if not start or width != start + real.shape[1]:
            return kept, real
        before = torch.ones_like(real[:, :1]).expand(-1, start)
        return torch.cat([before, kept], 1), torch.cat([before, real], 1)

    def _scale(self, path: str, largest: Tensor, grid: Grid) -> Tensor:
        if grid.static and path in self.spared.largest:  # else no other text came by here
            largest = torch.full_like(largest, self.spared.largest[path])
        return scale_of(grid, largest)

    def _kept(self) -> TokenMask:
        kept = self.spared.tokens
        return torch.zeros_like(self.batch.mask) if kept is None else kept.to(self.batch.mask)

    def cache(self) -> DynamicCache:
        """A cache that gives back what a rounded one holds."""
        from transformers import DynamicCache

        grid, kept, real = self.model.scheme.cache, self._kept(), self.batch.mask
        now = self

        class Rounding(DynamicCache):
            """Rounds new keys and values before it keeps them."""

            def update(
                self, keys: Tensor, values: Tensor, layer_idx: int, *rest: object, **how: object
            ) -> tuple[Tensor, Tensor]:
                if grid is None or not now.rounding:
                    return super().update(keys, values, layer_idx, *rest, **how)
                now.fired.add(CACHE)
                rounded_keys = _rounded_heads(keys, grid, kept, real)
                rounded_values = _rounded_heads(values, grid, kept, real)
                return super().update(rounded_keys, rounded_values, layer_idx, *rest, **how)

        return Rounding(config=self.model.plain.hf.config.get_text_config(decoder=True))

    def require_fired(self) -> None:
        """An edit that never acted is an error."""
        wanted = CACHE if self.model.scheme.cache is not None else None
        if not self.fired or (wanted and wanted not in self.fired):
            why = "its keys and values pass by no cache" if wanted else "no linear layer ran"
            name = type(self.model.plain.hf).__name__
            raise CaptureError(f"{self.model.scheme.name} rounded nothing in {name}: {why}.")


def _rounded_heads(
    x: Float[Tensor, "batch head pos d"], grid: Grid, kept: TokenMask, real: TokenMask
) -> Float[Tensor, "batch head pos d"]:
    """Keys or values as a cache of this grid keeps them: a scale for a token of a head, or for a
    channel of a head over the text's tokens.
    """  # noqa: D205
    left_out = (kept | ~real)[:, None, :, None].to(x.device)
    sizes = x.float().abs().masked_fill(left_out, 0.0)
    over = {"token": (-1,), "channel": (-2,)}.get(grid.per, (0, 1, 2, 3))
    made = rounded(x, scale_of(grid, sizes.amax(over, keepdim=True)), grid)
    return torch.where(kept[:, None, :, None].to(x.device), x, made)
