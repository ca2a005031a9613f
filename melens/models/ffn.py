"""A block's FFN: where its neurons are read and edited, the matrices it acts with, its formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn

from melens.errors import SiteError
from melens.models.anatomy import anatomy, check_layer
from melens.models.ffn_formula import bends
from melens.placement import device_of, has_other_forward, weights_here
from melens.protocols import HookedModel

LINEAR, CONV1D = "torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D"
ROWS, CHUNK = 3, 512
TOLERANCE, HALF_TOLERANCE = 1e-4, 4e-2
"""Of the largest entry that a row makes: sums run in another order, and half precision rounds in
steps of 2^-8; int8 activations, the finest that is not linear, are off by 1e-2 in float32.
"""


def matrix_of(
    module: nn.Module | None, stored: Callable[[], Tensor | None]
) -> Float[Tensor, "inside outside"] | None:
    """W such that the module makes ``x @ W`` of x, beside what it makes of zeros.

    Args:    module: the module that runs, or None where there is none of its own.
             stored: reads the matrix that is kept, in this orientation; None where it cannot be.
    Raises:  SiteError: the module does not act as any matrix.
    """
    kept = _or_none(stored)
    if module is None or _is_plain(module):
        return kept
    for matrix in _candidates(module, kept):
        if _explains(module, matrix):
            return matrix.to(matrix.dtype if kept is None else kept.dtype)
    raise SiteError(
        f"a {type(module).__name__} does not act as one matrix (quantised activations, or an "
        "adapter that is not linear), so its weights cannot be read; merge or dequantise it first."
    )


def is_adapted(model: nn.Module) -> bool:
    """Whether a PEFT adapter's layers stand in a model, unmerged."""
    return any(
        hasattr(part, "active_adapters") and hasattr(part, "merged_adapters")
        for part in model.modules()
    )


def _candidates(module: nn.Module, kept: Tensor | None) -> Iterator[Tensor]:
    if kept is not None:
        yield kept if (added := _added(module, kept)) is None else kept + added
    yield _probed(module)


def _added(module: Any, kept: Tensor) -> Tensor | None:
    """What PEFT's active adapters add to a matrix, where they say so."""
    if not hasattr(module, "get_delta_weight") or getattr(module, "merged", False):
        return None
    if getattr(module, "disable_adapters", False):
        return None
    made = torch.zeros_like(kept)
    for name in module.active_adapters:
        if name in getattr(module, "lora_A", {}):
            delta = module.get_delta_weight(name).detach().to(kept)
            made += delta if _kind(module.base_layer) == CONV1D else delta.T
    return made


def _is_plain(module: nn.Module) -> bool:
    """By the class itself: PEFT and quantisers call theirs Linear too."""
    return _kind(module) in (LINEAR, CONV1D) and not has_other_forward(module)


def _kind(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


@torch.no_grad()
def _probed(module: nn.Module) -> Float[Tensor, "inside outside"]:
    """Row n is what the module makes of the n-th unit vector."""
    inside = _inside(module)
    zero = _run(module, _like(module, torch.zeros(1, inside)))
    eye = torch.eye(inside)
    parts = [_run(module, _like(module, rows)) - zero for rows in eye.split(CHUNK)]
    return torch.cat(parts)


@torch.no_grad()
def _explains(module: nn.Module, matrix: Tensor) -> bool:
    rows = torch.randn(ROWS, len(matrix), generator=torch.Generator().manual_seed(0))
    given = _like(module, rows)
    made = (_run(module, given) - _run(module, torch.zeros_like(given))).float()
    expected = given.float() @ matrix.to(given.device).float()
    limit = TOLERANCE if given.dtype.itemsize > 2 else HALF_TOLERANCE
    scale = made.abs().amax(-1).clamp_min(1e-12)
    return bool(((made - expected).abs().amax(-1) <= limit * scale).all())


def _run(module: nn.Module, x: Tensor) -> Tensor:
    """Past the hooks on the module: an open edit is no part of its weights."""
    return module.forward(x).detach()


def _like(module: nn.Module, x: Tensor) -> Tensor:
    """In the dtype and on the device of what the module computes with."""
    values = [*module.parameters(), *module.buffers()]
    wide = next((v for v in values if v.is_floating_point() and v.dtype.itemsize > 1), None)
    return x.to(
        device_of(module) if values else x.device, torch.float32 if wide is None else wide.dtype
    )


def _inside(module: nn.Module) -> int:
    size = getattr(module, "in_features", None)
    if not isinstance(size, int):
        raise SiteError(
            f"the weights of a {type(module).__name__} cannot be read, and it does not say how "
            "wide its input is; dequantise the model first."
        )
    return size


def _or_none(stored: Callable[[], Tensor | None]) -> Tensor | None:
    try:
        found = stored()
    except NotImplementedError:  # TransformerLens: the storage is packed, or split from its scales
        return None
    return found.detach() if isinstance(found, Tensor) else None


ACTIVATIONS = ("act_fn", "activation_fn", "act", "gelu_impl")
"""Names under which FFN modules keep their activation function."""


@dataclass(frozen=True)
class FFN:
    """One block's FFN, gated or plain. Its product p is what the down projection reads."""

    layer: int
    gate: str | None
    """Hook of the gate before its activation; None where the FFN is not gated."""
    up: str
    """Hook of the up projection, before the activation where there is no gate."""
    product: str
    output: str
    """Hook of the down projection's output, before a norm on the write path."""
    weights: nn.Module
    """The module that holds W_gate, W_in and W_out."""
    activation: Callable[[Tensor], Tensor]

    @property
    def projection(self) -> torch.nn.Module:
        """The down projection's own module.

        Raises:  SiteError: the model multiplies without one (HookedTransformer).
        """
        found = _module(self.weights, "out")
        if found is None:
            raise SiteError(
                f"block {self.layer}'s down projection is no module of its own; load the model "
                "with melens.load, or ablate whole neurons."
            )
        return found

    @cached_property
    def down(self) -> Float[Tensor, "d_mlp d_model"]:
        """The down projection: row n is what neuron n writes, adapters included.

        Raises:  SiteError: it does not act as a matrix.
        """
        return self._matrix("out", "W_out")

    @cached_property
    def reads(self) -> tuple[Float[Tensor, "d_mlp d_model"] | None, Float[Tensor, "d_mlp d_model"]]:
        """What every neuron's gate (None without one) and up projection read."""
        gate = self._matrix("gate", "W_gate").T if self.gate else None
        return gate, self._matrix("in", "W_in").T

    def _matrix(self, part: str, stored: str) -> Tensor:
        with weights_here(self.weights):
            found = matrix_of(_module(self.weights, part), lambda: getattr(self.weights, stored))
        if found is None:
            raise SiteError(f"block {self.layer}'s {stored} cannot be read; dequantise it first.")
        return found

    def product_of(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_mlp"]:
        """The product for given FFN inputs, in float32 at least."""
        gate, up = self.reads
        made = _linear(x, up, getattr(self.weights, "b_in", None))
        if gate is None:
            return self.activation(made)
        return self.activation(_linear(x, gate, getattr(self.weights, "b_gate", None))) * made

    def written(self, product: Float[Tensor, "*row d_mlp"]) -> Float[Tensor, "*row d_model"]:
        """What the down projection makes of a product, bias included."""
        return _linear(product, self.down.T, getattr(self.weights, "b_out", None))


def ffn_of(model: HookedModel, layer: int) -> FFN:
    """The FFN of a block.

    Raises:  SiteError: no such layer, no FFN, or one without neurons that can be told apart (a
             Mixture of Experts).
    """
    check_layer(model, layer)
    known, prefix = model.hook_dict, f"blocks.{layer}."
    weights = getattr(model.blocks[layer], "mlp", None)
    if f"{prefix}mlp.hook_post" not in known or not _has_neurons(weights):
        raise SiteError(
            f"block {layer} has no FFN with neurons of its own (experts, or none); the edits "
            "write_block and norm_flatten work on it."
        )
    if not _fits(weights):
        raise SiteError(
            f"block {layer}'s up projection makes more than its down projection reads: one layer "
            "holds gate and up, and TransformerLens does not tell them apart."
        )
    inner = getattr(weights, "original_component", weights)
    act = vars(weights).get("_bend") or next(
        (f for name in ACTIVATIONS if (f := getattr(inner, name, None)) is not None), None
    )
    if act is None and isinstance(inner, nn.Module):
        act = _tried_activation(model.cfg.d_model, weights, inner)
    if act is None:
        raise SiteError(f"block {layer}'s FFN bends its neurons by no activation melens knows.")
    gated = f"{prefix}mlp.hook_pre_linear" in known
    return FFN(
        layer=layer,
        gate=f"{prefix}mlp.hook_pre" if gated else None,
        up=f"{prefix}mlp.hook_pre{'_linear' if gated else ''}",
        product=f"{prefix}mlp.hook_post",
        output=ffn_output(model, layer),
        weights=weights,
        activation=act,
    )


@torch.no_grad()
def _tried_activation(
    width: int, weights: object, inner: nn.Module
) -> Callable[[Tensor], Tensor] | None:
    """The activation that gives what the down projection reads, of a few random rows."""
    down, gate, up = (_module(weights, part) for part in ("out", "gate", "in"))
    if down is None or up is None:
        return None
    seen: list[Tensor] = []
    x = _like(up, torch.randn(1, ROWS, width, generator=torch.Generator().manual_seed(0)))
    handle = down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        inner.forward(x)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError):  # it takes more than its input
        return None
    finally:
        handle.remove()
    made, first = up.forward(x), None if gate is None else gate.forward(x)
    for bend in bends(inner):
        product = bend(made) if first is None else bend(first) * made
        if seen and torch.allclose(product, seen[0], rtol=1e-3, atol=1e-4):
            return bend
    return None


def ffn_input(model: HookedModel, layer: int) -> str:
    """Hook of what the FFN reads, its norm and gain included."""
    check_layer(model, layer)
    for site in ("mlp.hook_in", "ln2.hook_out"):
        if f"blocks.{layer}.{site}" in model.hook_dict:
            return f"blocks.{layer}.{site}"
    raise SiteError(f"block {layer} has no hook at its FFN's input.")


def _has_neurons(weights: object) -> TypeGuard[nn.Module]:
    """One down projection, as a matrix or in a module of its own whose storage is packed."""
    try:
        down = getattr(weights, "W_out", None)
    except NotImplementedError:
        return _module(weights, "out") is not None
    return isinstance(down, Tensor) and down.ndim == 2


def _fits(weights: object) -> bool:
    """Whether there are as many neurons behind the up projection as before the down projection."""
    try:
        up, down = getattr(weights, "W_in", None), getattr(weights, "W_out", None)
    except NotImplementedError:  # packed: its module says it where it is probed
        return True
    if not isinstance(up, Tensor) or up.ndim != 2:
        return True
    return isinstance(down, Tensor) and up.shape[-1] == down.shape[0]


def _module(weights: object, part: str) -> torch.nn.Module | None:
    """The model's own module behind a projection; None where the bridge multiplies by itself."""
    found = getattr(getattr(weights, part, None), "original_component", None)
    return found if isinstance(found, torch.nn.Module) else None


def ffn_output(model: HookedModel, layer: int) -> str:
    """Hook of what the FFN makes, before a norm on its write path.

    Raises:  SiteError: there is no such hook.
    """
    site = f"blocks.{layer}.mlp.hook_out"
    if site in model.hook_dict:
        return site
    block = anatomy(model).blocks[layer]
    if block.ffn_write is None or "ln2_post" in block.norms:
        raise SiteError(f"block {layer} has no hook between its FFN and the norm after it.")
    return block.ffn_write


def _linear(
    x: Float[Tensor, "*row inside"], weight: Float[Tensor, "outside inside"], bias: object
) -> Float[Tensor, "*row outside"]:
    wide = torch.promote_types(x.dtype, torch.float32)
    made = x.to(wide) @ weight.to(wide).T
    return made + bias.detach().to(wide) if isinstance(bias, Tensor) else made
