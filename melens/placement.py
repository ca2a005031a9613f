"""Where a model's weights are: on one device, on several, or offloaded and read as they are needed.

accelerate's ``device_map`` puts each block on a device. What fits on none stays in the host's
memory or on the disk: outside its own forward pass such a weight is a meta tensor, without values.
Here is what melens asks of such a model, so that nothing else has to know.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from melens.errors import ModelError
from melens.formatting import brief
from melens.protocols import AnyModel, Options, transformers_of

if TYPE_CHECKING:
    from accelerate.hooks import ModelHook

T = TypeVar("T")
DeviceMap = str | Mapping[str, int | str | torch.device] | None

MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""What ``device_map`` may be where it is not a dict."""
UNITS = ("GiB", "MiB", "KiB", "GB", "MB", "KB")
WHOLE = "load it without device_map, on one device that holds it"


def placement_options(
    device_map: DeviceMap,
    max_memory: Mapping[int | str, int | str] | None,
    offload_folder: str | Path | None,
    *,
    device: str | None = None,
) -> Options:
    """Options for transformers' ``from_pretrained``; empty without a ``device_map``.

    Args:    device_map: ``auto``, ``balanced``, ``balanced_low_0``, ``sequential``, or a dict of
             module names and devices (``cpu``, ``disk``, ``0``, ``cuda:1``).
             max_memory: device -> bytes or a size such as ``20GB``; needs a ``device_map``.
             offload_folder: where offloaded weights are written that no safetensors file holds.
    Raises:  ModelError: settings that do not fit each other.
    """
    if device_map is None:
        if max_memory or offload_folder:
            raise ModelError("max_memory and offload_folder are of device_map; add it, e.g. auto.")
        return {}
    if device is not None:
        raise ModelError(
            f"device={device!r:.40} and device_map both say where the model goes; give one."
        )
    if isinstance(device_map, str):
        if device_map not in MAPS:
            raise ModelError(
                f"device_map takes {', '.join(MAPS)} or a dict; got {brief(device_map)}. For one "
                "device give device= (--device)."
            )
    elif not isinstance(device_map, Mapping) or not device_map:
        raise ModelError(f"device_map takes {', '.join(MAPS)} or a dict of module names.")
    options: Options = {"device_map": device_map}
    if max_memory:
        options["max_memory"] = {_place(key): _size(value) for key, value in max_memory.items()}
    if offload_folder:
        options["offload_folder"] = str(Path(offload_folder).expanduser())
    return options


def memory_limits(text: str | None) -> dict[int | str, int | str] | None:
    """``cpu=4GB,0=20GB`` as a dict.

    Raises:  ModelError: what is no list of devices and sizes.
    """
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    return {_place(name.strip()): _size(size.strip()) for name, _, size in pairs}


def _place(name: object) -> int | str:
    if isinstance(name, int) or (isinstance(name, str) and name.isdecimal() and len(name) < 4):
        return int(name)
    if name in ("cpu", "mps", "disk"):
        return name
    raise ModelError(
        f"max_memory knows cpu, disk, mps and numbers of GPUs (0=20GB); got {brief(str(name))}."
    )


def _size(size: object) -> int | str:
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    unit = next((unit for unit in UNITS if str(size).endswith(unit)), "")
    number = str(size).removesuffix(unit)
    if unit and number.replace(".", "", 1).isdecimal() and number.isascii():
        return str(size)
    raise ModelError(f"max_memory takes sizes such as 20GB or 512MB; got {brief(str(size))}.")


def is_offloaded(model: AnyModel) -> bool:
    """Whether some of its weights are read from memory or disk at every pass."""
    return any(True for _ in _offloaded(model))


def _offloaded(model: AnyModel) -> Iterator[nn.Module]:
    """Modules that hold weights of their own which accelerate keeps elsewhere."""
    for module in model.modules():
        loads = getattr(vars(module).get("_hf_hook"), "offload", False)
        if loads and any(value.is_meta for value in _own(module).values()):
            yield module


def _own(module: nn.Module) -> dict[str, Tensor]:
    pairs = {**module._parameters, **module._buffers}.items()
    return {name: value for name, value in pairs if value is not None}


def missing_weights(model: nn.Module) -> list[str]:
    """Parameters without values that nothing will load when they are needed."""
    hooked = {id(module) for module in _offloaded(model)}
    return [
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        if id(module) not in hooked
        for name, value in module._parameters.items()
        if value is not None and value.is_meta
    ]


@contextmanager
def weights_here(module: nn.Module | None) -> Iterator[None]:
    """Offloaded weights of a module and all inside it have their values meanwhile, to be read.

    Nothing happens where all is in memory. What is written to them is lost at the end.
    """
    offloaded = [] if module is None else list(_offloaded(module))
    if not offloaded:
        yield
        return
    from accelerate.utils.modeling import align_module_device

    with ExitStack() as stack:
        for part in offloaded:
            stack.enter_context(align_module_device(part))
        yield


def named_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter with its values, offloaded ones module by module; not to be kept."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        away = any(value.is_meta for value in _own(module).values())
        with _own_weights_here(module) if away else nullcontext():
            for name, value in module._parameters.items():
                if value is None or id(value) in seen:
                    continue
                if not away:  # what is loaded for a moment may leave its id to the next
                    seen.add(id(value))
                yield f"{path}.{name}".lstrip("."), value


def _own_weights_here(module: nn.Module) -> AbstractContextManager[None]:
    """:func:`weights_here` of a module's own weights, and none of the modules inside it."""
    from accelerate.utils.modeling import align_module_device

    return align_module_device(module)


@contextmanager
def filled_state(model: AnyModel, take: Callable[[Tensor], T]) -> Iterator[dict[int, T]]:
    """Inside, ``model.state_dict()`` has a small stand-in for every offloaded tensor.

    Yields:  ``take`` of each such tensor's values, by the stand-in's id; one module at a time.
    """
    found: dict[int, T] = {}
    kept: list[Tensor] = []  # an id is one thing's own for as long as that lives

    def fill(module: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
        with _own_weights_here(module):
            for name, value in _own(module).items():
                if f"{prefix}{name}" in state and state[f"{prefix}{name}"].is_meta:
                    kept.append(torch.empty(0))
                    found[id(kept[-1])] = take(value)
                    state[f"{prefix}{name}"] = kept[-1]

    handles = [part.register_state_dict_post_hook(fill) for part in _offloaded(model)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def input_device(model: AnyModel) -> torch.device:
    """The device that token ids go to: the embedding's."""
    first = next(model.parameters())
    if not first.is_meta:
        return first.device
    inner = transformers_of(model)
    for module in inner.modules():
        hook = vars(module).get("_hf_hook")
        if hook is not None and module._parameters:
            return execution_device(hook) or torch.device("cpu")
    return first.device


def device_of(module: nn.Module, default: torch.device | None = None) -> torch.device:
    """The device that a module computes on; ``default``, else the CPU, where it has no weights."""
    first = next(iter([*module.parameters(), *module.buffers()]), None)
    if first is not None and not first.is_meta:
        return first.device
    for part in module.modules():
        hook = vars(part).get("_hf_hook")
        if hook is not None and (found := execution_device(hook)) is not None:
            return found
    return default or torch.device("cpu")


def called_there(module: nn.Module, x: Tensor) -> Tensor:
    """What a module makes of ``x``, on the device that the module computes on."""
    return module(x.to(device_of(module, x.device)))


def execution_device(hook: object) -> torch.device | None:
    """The device that a hook of accelerate moves its module's inputs to."""
    for one in getattr(hook, "hooks", (hook,)):
        if (found := getattr(one, "execution_device", None)) is not None:
            return torch.device(found)  # a number is one of this machine's accelerators
    return None


def placed(model: AnyModel) -> str:
    """Where a model computes, for records: ``cpu``, ``cuda:0``, ``cuda:0 + cuda:1``, with
    ``(offloaded)`` where weights are read at every pass.
    """  # noqa: D205
    inner = transformers_of(model)
    devices = {str(value.device) for value in inner.parameters() if not value.is_meta}
    devices |= {str(device_of(part)) for part in _offloaded(inner)}
    said = " + ".join(sorted(devices)) or str(next(model.parameters()).device)
    return f"{said} (offloaded)" if is_offloaded(inner) else said


def spread(model: nn.Module) -> str:
    """How much of a model is where, in words."""
    sizes: dict[str, int] = {}
    for value in model.parameters():
        place = "offloaded and read in every pass" if value.is_meta else f"on {value.device}"
        sizes[place] = sizes.get(place, 0) + value.numel() * value.element_size()
    return ", ".join(f"{size / 1e6:,.1f} MB {place}" for place, size in sorted(sizes.items()))


def same_hooks(made: nn.Module) -> None:
    """Give a shallow copy of a module the hook of accelerate that the first has, for itself.

    The hook moves what a module is called with to its device, and loads what is offloaded.
    """
    inside = vars(made)
    if "_hf_hook" not in inside:
        return
    inside["_hf_hook"] = _copied(inside["_hf_hook"])
    inside["_old_forward"] = old = type(made).forward.__get__(made)
    forward = functools.partial(_aligned, made)
    inside["forward"] = functools.update_wrapper(forward, old)


def _copied(hook: ModelHook) -> ModelHook:
    """A hook keeps what it notes between the start and the end of a call; two would mix it up."""
    from accelerate.hooks import SequentialHook

    made = copy.copy(hook)
    if isinstance(made, SequentialHook):
        made.hooks = tuple(_copied(one) for one in made.hooks)
    return made


def _aligned(module: nn.Module, *args: object, **kwargs: object) -> object:
    hook: ModelHook = vars(module)["_hf_hook"]
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    with torch.no_grad() if hook.no_grad else nullcontext():
        out = vars(module)["_old_forward"](*args, **kwargs)
    return hook.post_forward(module, out)


def has_other_forward(module: nn.Module) -> bool:
    """Whether somebody put another forward pass for a module's own; accelerate's is the same."""
    inside = vars(module)
    return "forward" in inside and "_hf_hook" not in inside


def require_whole(model: object, what: str) -> None:
    """Refuse what writes to weights, or saves them, where some are offloaded.

    Args:    what: the work, as the subject of a sentence.
    Raises:  ModelError: with what to do instead.
    """
    inner = transformers_of(model)
    if isinstance(inner, nn.Module) and is_offloaded(inner):
        raise ModelError(f"{what} needs every weight in memory, and some are offloaded; {WHOLE}.")


def require_undivided(model: nn.Module) -> None:
    """Refuse a model of whose weights this process holds pieces.

    Raises:  ModelError: tensor parallelism, or FSDP.
    """
    for name, value in model.named_parameters():
        if type(value).__name__ == "DTensor" or type(value.data).__name__ == "DTensor":
            raise ModelError(
                f"{name} of this {type(model).__name__} is a DTensor (tensor parallelism, or "
                "FSDP): hooks would see this process's heads and neurons alone; load it with "
                "device_map='auto', which keeps every block whole."
            )
