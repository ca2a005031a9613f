"""Which weights of a transformers model a quantiser rounds, and where they are multiplied."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from melens.errors import ModelError, WeightsError
from melens.models.anatomy import require_unfolded
from melens.models.decoder import layer_list
from melens.models.ffn import is_adapted
from melens.models.view import plain_view_of
from melens.placement import input_device, require_whole
from melens.protocols import HookedModel, TransformersModel
from melens.quantising.rounding import GROUPS, Matrix
from melens.results.quantise import LinearLayers

CLOSE = 1e-2
"""Largest difference of the plain model's logits over the largest of them: sums in another order,
in 16 bits too."""
PROBE = (1, 2, 3, 4)
SMALL = 0.01
"""Of a block's parameters: what is less (a state-space layer's A) is no matrix of a layer."""
ROUTERS = ("gate", "router", "shared_expert_gate")
"""Last parts of the names of routers, which every quantiser leaves whole."""


@dataclass(frozen=True)
class LinearWeight:
    """One parameter of the blocks that a linear layer, or all routed experts, multiply by."""

    name: str
    """As in the checkpoint's module tree, e.g. ``model.layers.0.mlp.down_proj.weight``."""
    layer: int
    module: nn.Module
    """Of a tree that belongs to nobody else."""
    attribute: str
    transposed: bool
    """Whether it is stored ``[inside, outside]`` (Conv1D, some experts)."""

    @property
    def stored(self) -> Tensor:
        """The parameter's values as they are."""
        return cast("Tensor", self.module._parameters[self.attribute]).detach()

    @property
    def matrix(self) -> Matrix:
        """``[..., outside, inside]``, a view of the stored values."""
        return self.as_matrix(self.stored)

    def as_matrix(self, values: Tensor) -> Tensor:
        """Stored values as a matrix, or the other way round."""
        return values.transpose(-1, -2) if self.transposed else values

    @property
    def path(self) -> str:
        """The module's name."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class PlainModel:
    """A bridge's model as transformers' own tree, sharing every weight; nobody else's hooks."""

    hf: TransformersModel
    weights: tuple[LinearWeight, ...]
    device: torch.device
    n_layers: int
    missed: tuple[str, ...]
    """Weights that are not rounded though a quantiser would: layers that no pass runs as modules,
    and experts that are kept in a way melens does not know."""

    def holding(self, parameter: object) -> LinearWeight | None:
        """The weight that is this very parameter of the bridge."""
        for one in self.weights:
            if one.module._parameters[one.attribute] is parameter:
                return one
        return None


@torch.no_grad()
def plain_model(bridge: HookedModel) -> PlainModel:
    """The transformers model that a bridge runs, to be quantised; the bridge stays as it is.

    Raises:  ModelError: it is quantised already, is not whole, or does not answer as the bridge.
    """
    inner = getattr(bridge, "original_model", None)
    if inner is None:
        raise ModelError("a HookedTransformer cannot be quantised; load it with melens.load.")
    if getattr(inner, "hf_quantizer", None) is not None:
        raise ModelError("this model is quantised already; give the weights it was made from.")
    require_whole(inner, "rounding of weights")
    if is_adapted(inner):
        raise ModelError("this model has PEFT adapters, which no engine rounds; merge them first.")
    require_unfolded(bridge)
    hf = cast("TransformersModel", plain_view_of(inner).eval())
    device = input_device(hf)
    ids = torch.tensor([PROBE], device=device)
    names = {id(module): name for name, module in hf.named_modules()}
    weights = tuple(
        weight for n, block in enumerate(layer_list(hf)) for weight in _weights(n, block, names)
    )
    if not weights:
        raise ModelError(f"the blocks of {type(hf).__name__} have no linear layers to quantise.")
    with _noting(weights) as ran:
        wanted, found = (model(ids, use_cache=False).logits.float() for model in (inner, hf))
    if not torch.isfinite(wanted).all():
        raise WeightsError(f"the logits of {type(hf).__name__} are not finite; see its weights.")
    if not float((wanted - found).abs().max()) <= CLOSE * float(wanted.abs().max()):
        raise ModelError(
            f"{type(hf).__name__} outside TransformerLens' modules answers otherwise than inside, "
            "so what is quantised would be another model."
        )
    missed = ({one.path for one in weights} - ran) | set(_unknown(layer_list(hf), names, weights))
    return PlainModel(hf, weights, device, len(layer_list(hf)), tuple(sorted(missed)))


def _unknown(
    blocks: nn.ModuleList, names: Mapping[int, str], weights: Sequence[LinearWeight]
) -> Iterator[str]:
    """Modules of blocks with a matrix that no LinearWeight is, and that is no small part."""
    known = {one.name for one in weights}
    for block in blocks:
        total = sum(value.numel() for value in block.parameters())
        for module in block.modules():
            whole = names[id(module)]
            if isinstance(module, nn.Conv1d) or whole.rpartition(".")[2] in ROUTERS:
                continue
            for name, value in module._parameters.items():
                small = value is None or value.squeeze().ndim < 2 or value.numel() < SMALL * total
                if not small and f"{whole}.{name}" not in known:
                    yield whole


@contextmanager
def _noting(weights: Sequence[LinearWeight]) -> Iterator[set[str]]:
    """Names of the linear layers that run as modules while this is open."""
    ran: set[str] = set()

    def note(name: str, *_: object) -> None:
        ran.add(name)

    modules = {one.path: one.module for one in weights}
    handles = [m.register_forward_pre_hook(partial(note, n)) for n, m in modules.items()]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def _weights(layer: int, block: nn.Module, names: dict[int, str]) -> Iterator[LinearWeight]:
    from transformers.pytorch_utils import Conv1D

    for module in block.modules():
        whole, last = names[id(module)], names[id(module)].rpartition(".")[2]
        if isinstance(module, (nn.Linear, Conv1D)):
            if last not in ROUTERS:
                flipped = isinstance(module, Conv1D)
                yield LinearWeight(f"{whole}.weight", layer, module, "weight", flipped)
            continue
        transposed = getattr(module, "is_transposed", None)  # of expert weights in one tensor
        for name, value in module._parameters.items():
            laid_out = transposed is not None and name.endswith("_proj")
            if value is not None and value.ndim == 3 and laid_out:
                yield LinearWeight(f"{whole}.{name}", layer, module, name, bool(transposed))


def linear_layers(plain: PlainModel) -> Iterator[LinearLayers]:
    """The weights that schemes round, those of one name and shape in all blocks as one."""
    found: dict[str, dict[str, LinearLayers]] = {}
    for one in plain.weights:
        width = one.matrix.shape[-1]
        own = LinearLayers(
            name=one.name,
            kind="experts" if one.stored.ndim == 3 else "Conv1D" if one.transposed else "Linear",
            inputs=width,
            group=next((size for size in GROUPS if width % size == 0), None),
        )
        anywhere = re.sub(rf"\.{one.layer}\.", ".*.", one.name, count=1)
        found.setdefault(anywhere, {})[one.name] = own
    for anywhere, layers in found.items():
        alike = [one.model_copy(update={"name": anywhere}) for one in layers.values()]
        yield from alike[:1] if alike.count(alike[0]) == len(alike) else layers.values()


def whole_layers(plain: PlainModel) -> tuple[str, ...]:
    """Names of the linear layers and routers that no scheme rounds."""
    from transformers.pytorch_utils import Conv1D

    rounded = {one.path for one in plain.weights}
    return tuple(
        name
        for name, module in plain.hf.named_modules()
        if name not in rounded
        and getattr(getattr(module, "weight", None), "ndim", 0) == 2
        and (isinstance(module, (nn.Linear, Conv1D)) or name.rpartition(".")[2] in ROUTERS)
    )
