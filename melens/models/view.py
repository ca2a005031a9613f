"""A second module tree over a model's own weights, to be hooked without touching the first.

Bridging replaces a model's submodules. A trainer goes on with the model that it was given, so what
is measured between two steps is a view: every module is a shallow copy, every parameter and buffer
the same object, so that what an optimiser writes in place is seen at once and no weight is kept
twice.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from melens.placement import same_hooks
from melens.protocols import PretrainedConfig

KEPT = "_melens_bridge"
"""Where a model object keeps the bridge that it was given; a view has none."""
BRIDGED = "_original_component"
"""Where a module of a bridge keeps the module that it stands for."""
OWN = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
"""What a module keeps its parts in; the copy has containers of its own, with the same parts."""


def view_of(model: nn.Module, *, hooked: bool = False) -> nn.Module:
    """The same model as another tree of modules; hooks set on one later are not on the other.

    Configs are copied too: a bridge writes the attention implementation into its own.

    Args:    hooked: the hooks that the first has now are on the second as well.
    """
    return _view(model, {}, hooked=hooked)


def plain_view_of(model: nn.Module) -> nn.Module:
    """:func:`view_of` a bridge's model without the bridge's own modules: transformers' tree again.

    The caller checks that it answers as the bridge does.
    """
    made = view_of(model)
    _strip(made)
    return made


def _strip(module: nn.Module) -> None:
    for name, found in list(module._modules.items()):
        inner = found
        while inner is not None and BRIDGED in inner._modules:
            inner = inner._modules[BRIDGED]
        module._modules[name] = inner
        if inner is not None:
            _strip(inner)


def merged_view_of(model: nn.Module) -> nn.Module:
    """:func:`view_of`, with copies of the layers that have adapters, which PEFT merged into them.

    A bridge may split a layer that queries, keys and values share, past an adapter around it. The
    copies are of this moment: :func:`merge_again` once the adapters have changed.
    """
    made = view_of(model)
    _merge(made)
    return made


@torch.no_grad()
def merge_again(view: nn.Module, model: nn.Module) -> None:
    """Write the current adapters into the copies of a model's :func:`merged_view_of`, in place:
    a bridge around the view sees them.
    """  # noqa: D205
    for name, child in model.named_children():
        inside = view._modules[name]
        assert inside is not None
        if _adapts(child):
            for own, value in _merged(child).named_parameters():
                inside.get_parameter(own).copy_(value)
        elif not hasattr(child, "modules_to_save"):  # those are the optimiser's own
            merge_again(inside, child)


@torch.no_grad()
def _merge(module: nn.Module) -> None:
    for name, found in module.named_children():
        child: Any = found  # PEFT's layers, told by what they have
        if _adapts(child):
            module._modules[name] = _merged(child)
        elif hasattr(child, "modules_to_save"):
            module._modules[name] = child.modules_to_save[child.active_adapters[0]]
        else:
            _merge(child)


def _adapts(module: nn.Module) -> bool:
    return hasattr(module, "get_delta_weight")


def _merged(layer: nn.Module) -> nn.Module:
    """A copy of the layer inside one or more adapters, with those that are in force in it."""
    inner: Any = copy.deepcopy(layer)
    while hasattr(inner, "base_layer"):
        waiting = set(inner.active_adapters) - set(inner.merged_adapters)
        if waiting and not inner.disable_adapters:
            inner.merge()
        inner = inner.base_layer
    return inner


def adapters_of(module: nn.Module) -> tuple[bool, tuple[str, ...]] | None:
    """Whether a layer's adapters of PEFT's are off, and which are active; None where it has none.

    Of a transformers model both names are methods.
    """
    off = getattr(module, "disable_adapters", None)
    active: Any = getattr(module, "active_adapters", ())
    return (off, tuple(active)) if isinstance(off, bool) else None


def parts_of(model: nn.Module) -> list[object]:
    """What a view takes over from its model, to be compared later: it fits while these are equal,
    and holds them, so that no id is another's.
    """  # noqa: D205
    found: list[object] = []
    for module in model.modules():
        found += [module, adapters_of(module)]
    for value in model.parameters():
        found += [id(value), value.device, value.dtype]
    return found


def _quiet(config: PretrainedConfig) -> PretrainedConfig:
    """A copy that asks for logits alone: a trainer wants the routers' as well, and takes them with
    hooks of its own that a view does not have.
    """  # noqa: D205
    made = copy.deepcopy(config)
    if getattr(made, "output_router_logits", False):
        made.output_router_logits = False
    return made


def _view(module: nn.Module, configs: dict[int, PretrainedConfig], *, hooked: bool) -> nn.Module:
    made = copy.copy(module)
    inside = made.__dict__
    for name in OWN:
        inside[name] = copy.copy(inside[name])
    for name, value in list(inside.items()):
        if "_hooks" in name and isinstance(value, dict):
            inside[name] = copy.copy(value) if hooked else type(value)()
    inside.pop(KEPT, None)
    inside.pop("forward", None)  # a wrapper bound to the first tree (autocast of accelerate)
    same_hooks(made)
    if "config" in inside:
        config = inside["config"]
        inside["config"] = configs.setdefault(id(config), _quiet(config))
    for name, child in inside["_modules"].items():
        if child is not None:
            inside["_modules"][name] = _view(child, configs, hooked=hooked)
    return made
