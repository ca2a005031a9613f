"""A block's FFN: where its neurons can be read and edited, its matrices, and its formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from melens.errors import SiteError
from melens.models.anatomy import anatomy, check_layer
from melens.models.effective import matrix_of

ACTIVATIONS = ("act_fn", "activation_fn", "act")
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
    weights: Any
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


def ffn_of(model: Any, layer: int) -> FFN:
    """The FFN of a block.

    Raises:  SiteError: no such layer, no FFN, or one without neurons that can be told apart (a
             Mixture of Experts).
    """  # fmt: skip
    check_layer(model, layer)
    known, prefix = model.hook_dict, f"blocks.{layer}."
    weights = getattr(model.blocks[layer], "mlp", None)
    if f"{prefix}mlp.hook_post" not in known or not _has_neurons(weights):
        raise SiteError(
            f"block {layer} has no FFN with neurons of its own (a Mixture of Experts, or none); "
            "the edits write_block and norm_flatten work on it."
        )
    inner = getattr(weights, "original_component", weights)
    act = next((f for name in ACTIVATIONS if (f := getattr(inner, name, None)) is not None), None)
    if act is None:
        raise SiteError(f"block {layer}'s FFN keeps its activation under a name melens lacks.")
    gated = f"{prefix}mlp.hook_pre_linear" in known
    return FFN(
        layer=layer,
        gate=f"{prefix}mlp.hook_pre" if gated else None,
        up=f"{prefix}mlp.hook_pre{'_linear' if gated else ''}",
        product=f"{prefix}mlp.hook_post",
        output=_output(model, layer),
        weights=weights,
        activation=act,
    )


def ffn_input(model: Any, layer: int) -> str:
    """Hook of what the FFN reads, its norm and gain included."""
    check_layer(model, layer)
    for site in ("mlp.hook_in", "ln2.hook_out"):
        if f"blocks.{layer}.{site}" in model.hook_dict:
            return f"blocks.{layer}.{site}"
    raise SiteError(f"block {layer} has no hook at its FFN's input.")


def _has_neurons(weights: Any) -> bool:
    """One down projection, as a matrix or in a module of its own whose storage is packed."""
    try:
        down = getattr(weights, "W_out", None)
    except NotImplementedError:
        return _module(weights, "out") is not None
    return isinstance(down, Tensor) and down.ndim == 2


def _module(weights: Any, part: str) -> torch.nn.Module | None:
    """The model's own module behind a projection; None where the bridge multiplies by itself."""
    found = getattr(getattr(weights, part, None), "original_component", None)
    return found if isinstance(found, torch.nn.Module) else None


def _output(model: Any, layer: int) -> str:
    site = f"blocks.{layer}.mlp.hook_out"
    if site in model.hook_dict:
        return site
    block = anatomy(model).blocks[layer]
    if block.ffn_write is None or "ln2_post" in block.norms:
        raise SiteError(f"block {layer} has no hook between its FFN and the norm after it.")
    return block.ffn_write


def _linear(
    x: Float[Tensor, "*row inside"], weight: Float[Tensor, "outside inside"], bias: Any
) -> Float[Tensor, "*row outside"]:
    wide = torch.promote_types(x.dtype, torch.float32)
    made = x.to(wide) @ weight.to(wide).T
    return made + bias.detach().to(wide) if isinstance(bias, Tensor) else made
