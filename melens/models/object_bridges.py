"""The bridge that a transformers model object was given, as long as it still fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from melens.models.view import KEPT, adapters_of
from melens.protocols import HookedModel, is_hooked


@dataclass
class Kept:
    """A bridge, kept on the object that it was made of; copies of the object have none."""

    state: object = None
    """:func:`state_of` the object when it was bridged."""
    bridge: HookedModel | None = None

    def __deepcopy__(self, memo: object) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


def kept_bridge(model: object) -> HookedModel | None:
    """The bridge that an object is, or was given; None where it has none that still fits.

    A bridge has modules of its own. It no longer fits an object that was moved or cast, got other
    parameters, modules, hooks or adapters, or was trained where the bridge has copies of its
    weights (queries, keys and values out of one matrix).
    """
    if is_hooked(model):
        return model
    bridge = last_bridge(model)
    if bridge is None or not isinstance(model, nn.Module):
        return None
    return bridge if _kept(model).state == state_of(model, bridge) else None


def last_bridge(model: object) -> HookedModel | None:
    """The bridge that an object was given last, whether it still fits or not."""
    return _kept(model).bridge


def _kept(model: object) -> Kept:
    return getattr(model, "__dict__", {}).get(KEPT) or Kept()


def keep_bridge(model: nn.Module, bridge: HookedModel) -> None:
    """Keep a bridge on the object that it was made of."""
    vars(model)[KEPT] = Kept(state_of(model, bridge), bridge)


def state_of(model: nn.Module, bridge: HookedModel) -> object:
    """All that a bridge took over from its model, to be compared later."""
    tensors = [*model.parameters(), *model.buffers()]
    held = {x.untyped_storage().data_ptr() for x in tensors if not x.is_meta}
    own = (x for x in bridge.parameters() if not x.is_meta)
    copies = any(x.untyped_storage().data_ptr() not in held for x in own)
    versions = [x._version for x in tensors if not x.is_inference()] if copies else []
    # offloaded: another tensor after every pass
    places = [(0, 0) if x.is_meta else (id(x), x.data_ptr()) for x in tensors]
    return places, versions, [tuple(_of_module(module)) for module in model.modules()]


def _of_module(module: nn.Module) -> Iterator[object]:
    """Which module it is, what else runs with it, and the factors that it computes with."""
    yield id(module)
    yield tuple(module._forward_hooks), tuple(module._forward_pre_hooks)
    yield id(vars(module).get("forward"))
    for name, value in vars(module).items():
        if type(value) is float:
            yield name, value
    if (adapters := adapters_of(module)) is not None:
        yield adapters, str(getattr(module, "scaling", None))
