"""A block's routed experts: which of them a token goes to, and what each neuron of theirs makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from melens.errors import SiteError
from melens.models.anatomy import check_layer
from melens.placement import weights_here
from melens.protocols import Args, HookedModel, Kwargs

TOLERANCE, HALF_TOLERANCE = 1e-3, 5e-2
"""Of the largest entry that the experts write, by sums in another order."""
Rows = Float[Tensor, "token d_model"]


@dataclass(frozen=True)
class Routed:
    """Where tokens go: for each of them its experts and what their writes are multiplied by."""

    index: Int[Tensor, "token slot"]
    weight: Float[Tensor, "token slot"]


@dataclass(frozen=True)
class Experts:
    """One block's routed experts, all in one module, as transformers keeps them."""

    layer: int
    ffn: nn.Module
    """The whole FFN: router, experts, shared experts."""
    module: Any
    """The experts alone; what it gives is their weighted sum."""
    count: int

    def route(self, x: Rows) -> Routed:
        """The router's choice for FFN inputs.

        Raises:  SiteError: the experts do not do what their weights say.
        """
        seen: list[tuple[Args, Kwargs, Tensor]] = []

        def keep(module: nn.Module, args: Args, kwargs: Kwargs, out: Tensor) -> None:
            seen.append((args, kwargs, out.clone()))  # shared ones may be added in place

        handle = self.module.register_forward_hook(keep, with_kwargs=True)
        try:
            with torch.no_grad():
                self.ffn.forward(x[None])
        except torch.OutOfMemoryError:
            raise
        except (TypeError, RuntimeError):
            raise self.refusal("its FFN takes more than its input") from None
        finally:
            handle.remove()
        if not seen:
            raise self.refusal("its FFN does not run them")
        args, kwargs, out = seen[0]
        given, routed = self.called(args, kwargs, len(x))
        self._require_explained(given, routed, out)
        return routed

    def called(self, args: Args, kwargs: Kwargs, tokens: int) -> tuple[Rows, Routed]:
        """What a call of the experts' module was given: its tokens, and where they go.

        Raises:  SiteError: it was called otherwise than once with all of these tokens.
        """
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        index = next((t for t in given if t.ndim == 2 and not t.is_floating_point()), None)
        weight = next(
            (
                t
                for t in given[1:]
                if index is not None and t.shape == index.shape and t.is_floating_point()
            ),
            None,
        )
        if index is None or weight is None or given[0].ndim != 2 or len(given[0]) != tokens:
            raise self.refusal("its experts are not called token by token")
        return given[0].detach(), Routed(index, weight.detach())

    @torch.no_grad()
    def written(self, x: Rows) -> Rows:
        """What the whole FFN makes, shared experts included, before the block scales it."""
        out = self.ffn.forward(x[None])
        return (out[0] if isinstance(out, tuple) else out).reshape(x.shape)

    @torch.no_grad()
    def product(self, x: Rows, expert: int) -> Float[Tensor, "token neuron"]:
        """What the down projection of one expert reads."""
        module = self.module
        name = "gate_up_proj" if module.has_gate else "up_proj"
        made = x @ self._matrix(name, expert)
        with weights_here(module):
            bias = getattr(module, f"{name}_bias", None)
        made = made if bias is None else made + bias[expert]
        return module._apply_gate(made) if module.has_gate else module.act_fn(made)

    def down(self, expert: int) -> Float[Tensor, "neuron d_model"]:
        """Row n is what neuron n writes: a view of the stored weights."""
        return self._matrix("down_proj", expert).detach()

    def bias(self, expert: int) -> Float[Tensor, " d_model"] | None:
        """What its down projection adds: a view of the stored bias; None without one."""
        with weights_here(self.module):
            stored = getattr(self.module, "down_proj_bias", None)
        return None if stored is None else stored[expert].detach()

    def used(self, routed: Routed) -> list[int]:
        """Experts that any token goes to; slots that nothing is routed to are left out."""
        return [n for n in routed.index.unique().tolist() if 0 <= n < self.count]

    @property
    def has_others(self) -> bool:
        """Whether other matrices of the FFN write beside them: shared experts."""
        inside = {id(value) for value in self.module.parameters()}
        width = self.down(0).shape[1]
        rest = (value for value in self.ffn.parameters() if id(value) not in inside)
        return any(value.ndim == 2 and value.shape[0] == width for value in rest)

    def _matrix(self, name: str, expert: int) -> Float[Tensor, "inside outside"]:
        with weights_here(self.module):
            stored = getattr(self.module, name)[expert]
        return stored if self.module.is_transposed else stored.T

    @torch.no_grad()
    def _require_explained(self, x: Rows, routed: Routed, out: Tensor) -> None:
        made = torch.zeros_like(x)
        for expert in self.used(routed):
            bias = self.bias(expert)
            token, slot = torch.where(routed.index == expert)
            write = self.product(x[token], expert) @ self.down(expert)
            write = write if bias is None else write + bias
            made.index_add_(0, token, write * routed.weight[token, slot, None].to(write))
        limit = TOLERANCE if x.dtype.itemsize > 2 else HALF_TOLERANCE
        apart = (made - out.reshape(made.shape)).abs().max()
        if not apart <= limit * out.abs().max().clamp_min(1e-30):
            raise self.refusal("its experts do more than their weights say")

    def refusal(self, why: str) -> SiteError:
        """The error that says why these experts cannot be read."""
        return SiteError(f"block {self.layer}'s experts cannot be told apart: {why}.")


def has_experts(model: HookedModel, layer: int) -> bool:
    """Whether a block keeps routed experts in a way melens knows."""
    return _found(model, layer) is not None


def experts_of(model: HookedModel, layer: int) -> Experts:
    """The routed experts of a block.

    Raises:  SiteError: no such layer, no experts, or experts kept in a way melens does not know.
    """
    check_layer(model, layer)
    if (found := _found(model, layer)) is None:
        raise SiteError(f"block {layer} has no routed experts whose weights melens can read.")
    return found


def _found(model: HookedModel, layer: int) -> Experts | None:
    ffn = getattr(getattr(model.blocks[layer], "mlp", None), "original_component", None)
    if not isinstance(ffn, nn.Module):
        return None
    for module in ffn.modules():
        down = getattr(module, "down_proj", None)
        known = hasattr(module, "is_transposed") and hasattr(module, "has_gate")
        if isinstance(down, Tensor) and down.ndim == 3 and known:
            return Experts(layer, ffn, module, len(down))
    return None
