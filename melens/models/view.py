"""A second module tree over a model's own weights, to be hooked without touching the first.

Bridging replaces a model's submodules. A trainer goes on with the model that it was given, so what
is measured between two steps is a view: every module is a shallow copy, every parameter and buffer
the same object, so that what an optimiser writes in place is seen at once and no weight is kept
twice.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

OWN = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
"""What a module keeps its parts in; the copy has containers of its own, with the same parts."""


def view_of(model: nn.Module) -> nn.Module:
    """The same model as another tree of modules; hooks on the first are not on the second.

    Configs are copied too: a bridge writes the attention implementation into its own.
    """
    return _view(model, {})


def _view(module: nn.Module, configs: dict[int, Any]) -> nn.Module:
    made = copy.copy(module)
    inside = made.__dict__
    for name in OWN:
        inside[name] = copy.copy(inside[name])
    for name, value in list(inside.items()):
        if "_hooks" in name and isinstance(value, dict):
            inside[name] = type(value)()
    inside.pop("forward", None)  # a wrapper bound to the first tree (autocast of accelerate)
    if "config" in inside:
        config = inside["config"]
        inside["config"] = configs.setdefault(id(config), copy.deepcopy(config))
    for name, child in inside["_modules"].items():
        if child is not None:
            inside["_modules"][name] = _view(child, configs)
    return made
