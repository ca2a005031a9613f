"""Several devices on a machine without any: CPU tensors that say they are elsewhere.

Every tensor of ``elsewhere(n)`` is a wrapper around one of the CPU. An operation on tensors of two
devices fails, as it does on real ones; copies between devices are noted.
"""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

KIND = "cuda"
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


def elsewhere(number: int) -> torch.device:
    return torch.device(KIND, number)


class There(torch.Tensor):
    """A CPU tensor that says it is on another device."""

    @staticmethod
    def __new__(cls, inside: torch.Tensor, device: torch.device):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inside.size(),
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            device=device,
            requires_grad=False,
        )
        made.inside = inside
        return made

    def __repr__(self, **_):
        return f"There({self.inside}, {self.device})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            return indexed(func, *args)  # torch asks the driver of a device there
        if func in (torch.Tensor.untyped_storage, torch.Tensor.data_ptr):
            return func(args[0].inside)
        if func is torch.Tensor.tolist:
            return args[0].cpu().tolist()
        if func in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError(f"can't convert {args[0].device} tensor to numpy; use .cpu() first")
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        except RuntimeError as error:
            if "not linked" not in str(error):
                raise
            return run(func, args, kwargs or {}, [])  # Python's own part asks the driver

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {}, [])


def run(func, args, kwargs, copies):
    """One operation, on the CPU; what it makes is where its tensors are."""
    name = getattr(func, "overloadpacket", func).__name__
    tensors = []
    tree_map(lambda x: tensors.append(x) if isinstance(x, torch.Tensor) else None, (args, kwargs))
    asked = kwargs.get("device")
    devices = {x.device for x in tensors if x.ndim or isinstance(x, There)}
    if name == "_to_copy" or name == "copy_":
        devices = {tensors[0].device}
        if name == "copy_" and len(tensors) > 1 and tensors[1].device != tensors[0].device:
            copies.append((tensors[1].device, tensors[0].device, tuple(tensors[1].shape)))
    elif name in INDEXED:
        devices = {tensors[0].device} | {x.device for x in tensors[1:] if x.device.type == KIND}
    if len(devices) > 1:
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, found {devices}"
        )
    here = asked if asked is not None else next(iter(devices), None)
    here = None if here is None else torch.device(here)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        if tensors and here != tensors[0].device:
            copies.append((tensors[0].device, here, tuple(tensors[0].shape)))
    bare = tree_map(lambda x: x.inside if isinstance(x, There) else x, (args, kwargs))
    out = func(*bare[0], **bare[1])
    if here is None or here.type != KIND:
        return out
    given = {id(x.inside): x for x in tensors if isinstance(x, There)}

    def wrap(x):
        if not isinstance(x, torch.Tensor):
            return x
        return given.get(id(x)) if id(x) in given else There(x, here)

    return tree_map(wrap, out)


def indexed(func, x, index, *value):
    """x[index] and x[index] = value."""
    device = x.device
    tensors = []
    tree_map(lambda i: tensors.append(i) if isinstance(i, There) else None, (index, value))
    if any(i.device != device for i in tensors):
        raise RuntimeError(f"indices should be on the CPU or on {device}, found {tensors}")
    bare = tree_map(lambda i: i.inside if isinstance(i, There) else i, (x, index, value))
    out = func(bare[0], bare[1], *bare[2])
    return There(out, device) if isinstance(out, torch.Tensor) and device.type == KIND else out


class Made(TorchFunctionMode):
    """torch.tensor writes straight into memory: on the CPU first, then copied."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            device = kwargs.pop("device", None)
            made = func(*args, **kwargs)
            return made if device is None else made.to(device)
        if func is torch.unravel_index and isinstance(args[0], There):
            return run(func, args, kwargs, [])
        return func(*args, **kwargs)


class Devices(TorchDispatchMode):
    """Watches every operation; ``copies`` are (from, to, shape)."""

    def __init__(self):
        super().__init__()
        self.copies = []

    def __enter__(self):
        torch.cuda._initialized = True  # or torch would look for a driver
        self.memory, torch.cuda.mem_get_info = torch.cuda.mem_get_info, lambda _: (2**31, 2**31)
        self.made = Made()
        self.made.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        torch.cuda._initialized, torch.cuda.mem_get_info = False, self.memory
        self.made.__exit__(*error)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {}, self.copies)
