"""What finished blocks gave, on disk: a pass made again goes on at the block where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from melens.errors import ModelError
from melens.models.decoder import layer_list
from melens.protocols import Args, HookedModel, JsonObject, Kwargs, TransformersModel
from melens.provenance import versions
from melens.store import PAGE, digest, hash_facts, read_limited, tensor_bytes, write_atomically

OUT = "out"
"""The block's own output, beside its sites' names."""


class Tape:
    """Keeps, for every pass and block, the tapped sites and the output; plays them back.

    A pass is known by what the model was called with. A block that is played back is not read and
    not run: its hooks are called with what they saw the first time. An edit inside it would have no
    effect, and a pass under an edit would be played back as the clean one, so both are refused.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """A folder of its own inside ``folder`` for this checkpoint and these versions."""
        self.folder = folder / hash_facts([key, versions()])
        self.played = 0
        """Blocks that were taken from disk instead of being run."""
        self._pass = self.folder
        self._originals: dict[int, nn.Module] = {}
        self._watched: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def weights(self) -> str | None:
        """Fingerprint that an earlier run noted when the contract held; None for a new tape."""
        try:
            return json.loads(read_limited(self.folder / "checked.json", PAGE))["weights"]
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            return None

    def note_weights(self, fingerprint: str) -> None:
        """Note that the contract held."""
        write_atomically(self.folder / "checked.json", json.dumps({"weights": fingerprint}))

    def attach(self, bridge: HookedModel, model: TransformersModel) -> None:
        """Record and play back from now on."""
        self._bridge, self._stack = bridge, layer_list(model)
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end, always_call=True)
        self._own_hooks = len(model._forward_pre_hooks)
        for layer, block in enumerate(self._stack):
            block.register_forward_pre_hook(self._watching(layer), prepend=True)
            block.register_forward_hook(self._keeping(layer))

    def _begin(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        self._restore()  # an interrupt may have left the last pass unfinished
        if len(module._forward_pre_hooks) > self._own_hooks:  # every edit of melens has one there
            _refuse()
        self._pass = self.folder / digest(_parts((args, sorted(kwargs.items()))))
        for layer in range(len(self._stack)):
            kept = self._read(layer)
            points = _tapped(self._bridge, layer)
            if kept is None or not set(points) <= set(kept):
                return
            self._originals[layer] = self._stack[layer]
            self._stack[layer] = _Played(points, kept, self._stack[layer])
            self.played += 1

    def _end(self, module: nn.Module, args: Args, output: object) -> None:
        self._restore()

    def _restore(self) -> None:
        self._forget()
        for layer, block in self._originals.items():
            self._stack[layer] = block
        self._originals.clear()

    def _forget(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._watched = {}

    def _watching(self, layer: int) -> Callable[..., None]:
        def watch(module: nn.Module, args: Args) -> None:
            self._forget()
            for name, point in _tapped(self._bridge, layer).items():
                self._handles.append(point.register_forward_hook(self._noting(name), prepend=True))
                self._handles.append(point.register_forward_hook(_unchanged))

        return watch

    def _noting(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Args, output: Tensor) -> None:
            self._watched[name] = output.detach().cpu().clone()

        return note

    def _keeping(self, layer: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: Args, output: object) -> None:
            if isinstance(output, Tensor):  # else this family's blocks cannot be played back
                found = {**self._watched, OUT: output.detach().cpu()}
                data = save({name: value.contiguous() for name, value in found.items()})
                write_atomically(self._file(layer), data)
            self._forget()

        return keep

    def _file(self, layer: int) -> Path:
        return self._pass / f"block-{layer:03d}.safetensors"

    def _read(self, layer: int) -> dict[str, Tensor] | None:
        try:
            return load(self._file(layer).read_bytes())
        except (OSError, SafetensorError):
            return None


class _Played(nn.Module):
    """Stands where a block was; looks like it to whoever asks for its attributes."""

    def __init__(self, points: JsonObject, kept: dict[str, Tensor], block: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(points=points, kept=kept, block=block)  # not as submodules

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, resid: Tensor, *args: Args, **kwargs: object) -> Tensor:
        for name, point in self.points.items():
            value = self.kept[name].to(resid.device)
            _unchanged(point, (value,), point(value))
        return self.kept[OUT].to(resid.device)


def _unchanged(point: nn.Module, args: Args, output: object) -> None:
    """After all hooks of a point: whoever edits returns another tensor."""
    if output is not args[0]:
        _refuse()


def _refuse() -> None:
    raise ModelError(
        "a model streamed with keep= cannot be edited, its passes are kept as clean ones; stream "
        "it without keep=."
    )


def _tapped(bridge: HookedModel, layer: int) -> JsonObject:
    """A block's hook points that somebody listens to, each once, in the order of the hooks."""
    found: dict[int, tuple[str, object]] = {}
    for name, point in bridge.hook_dict.items():
        if name.startswith(f"blocks.{layer}.") and any(
            not handle.is_permanent for handle in point.fwd_hooks
        ):
            found.setdefault(id(point), (name, point))
    return dict(found.values())


def _parts(value: object) -> Iterator[str | memoryview]:
    """What tells calls of a model apart."""
    if isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}"
        yield tensor_bytes(value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _parts(item)
    else:
        yield repr(value)
