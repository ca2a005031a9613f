"""A model without weights: its modules, and where in the files each parameter is to come from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from melens.errors import ModelError, WeightsError
from melens.models.checkpoint import Checkpoint
from melens.models.complaints import first_line, what_to_do
from melens.models.decoder import layer_list
from melens.models.multimodal import WHOLE, inner_config
from melens.protocols import JsonObject, TransformersModel


@dataclass(frozen=True)
class Piece:
    """One stored tensor, and the part of the parameter that it fills."""

    name: str
    part: tuple[int | slice, ...] = ()


@dataclass
class Slot:
    """One parameter of one module: a placeholder (NaN, a single value in memory) or filled."""

    module: nn.Module
    name: str
    pieces: tuple[Piece, ...]
    placeholder: nn.Parameter

    def fill(self, value: Tensor) -> None:
        """Put real values in place."""
        self.module._parameters[self.name] = nn.Parameter(value, requires_grad=False)

    def empty(self) -> None:
        """Let go of them."""
        self.module._parameters[self.name] = self.placeholder

    def room(self) -> Tensor:
        """Memory for its values, in the model's dtype and on its device."""
        return torch.empty(
            self.placeholder.shape, dtype=self.placeholder.dtype, device=self.placeholder.device
        )

    def read(self, checkpoint: Checkpoint, room: Tensor) -> Tensor:
        """The whole parameter, in the memory given.

        Raises:  WeightsError: NaN, or a file that ends too soon.
        """
        for piece in self.pieces:
            checkpoint.read(piece.name, room[piece.part] if piece.part else room)
        return room


@dataclass
class Skeleton:
    """A transformers model whose parameters are placeholders, and the slots to fill, by place."""

    model: TransformersModel
    blocks: list[list[Slot]]
    embedding: Slot
    unembedding: Slot | None
    """None where it shares the embedding's weight."""


def placeholder_of(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
) -> nn.Parameter:
    """NaN of any shape in the memory of one value: reading it by mistake cannot pass unseen, and
    overwriting it fails.
    """  # noqa: D205
    value = torch.full((1,), float("nan"), dtype=dtype, device=device)
    return nn.Parameter(value.expand(shape) if shape else value[0], requires_grad=False)


def build_skeleton(
    folder: Path, checkpoint: Checkpoint, *, dtype: torch.dtype | str | None, device: str
) -> Skeleton:
    """The model that a folder's config asks for, every weight's place in the files checked.

    Norms, positions and what else lies outside the blocks is read at once; it is small.

    Raises:  ModelError: no such model, or a quantised one. WeightsError: a tensor that is missing
             or has another shape.
    """
    model = _meta_model(folder, checkpoint.config, dtype)
    stack = layer_list(model)
    prefix = next(name for name, module in model.named_modules() if module is stack)
    translated, joined = _translated(model, checkpoint)
    slots: dict[str, Slot] = {}
    by_id: dict[int, nn.Parameter] = {}
    embedding, unembedding = model.get_input_embeddings(), model.get_output_embeddings()
    for path, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            shape = tuple(parameter.shape)
            if id(parameter) not in by_id:
                by_id[id(parameter)] = placeholder_of(shape, parameter.dtype, device)
                full = f"{path}.{name}"
                known = translated.get(full, full)
                pieces = joined.get(full) or _named(checkpoint, known, model)
                _require_shapes(checkpoint, pieces, shape)
                slots[full] = Slot(module, name, pieces, by_id[id(parameter)])
            module._parameters[name] = by_id[id(parameter)]
    del by_id
    _read_buffers(model, checkpoint)
    blocks: list[list[Slot]] = [[] for _ in stack]
    apart: dict[int, Slot] = {}
    for full, slot in slots.items():
        if full.startswith(f"{prefix}."):
            blocks[int(full[len(prefix) + 1 :].split(".")[0])].append(slot)
        elif slot.module in (embedding, unembedding) and slot.name == "weight":
            apart[id(slot.module)] = slot
        else:
            slot.fill(slot.read(checkpoint, slot.room()))
    return Skeleton(model, blocks, apart[id(embedding)], apart.get(id(unembedding)))


def _translated(
    model: TransformersModel, checkpoint: Checkpoint
) -> tuple[dict[str, str], dict[str, tuple[Piece, ...]]]:
    """What transformers renames as it loads: a parameter's name -> the one in the files; and what
    it puts together of several stored tensors: the name -> these.
    """  # noqa: D205
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    order = {
        pattern: (i, how)
        for step in converters
        if (how := _way(step.operations)) is not None
        for i, pattern in enumerate(step.source_patterns)
    }
    wanted, found = dict(model.named_parameters()), {}
    parts: dict[str, dict[int, list[str]]] = {}
    ways: dict[str, str] = {}
    for stored in checkpoint.tensors:
        name, converted = rename_source_key(
            stored, renamings, converters, model.base_model_prefix, wanted
        )
        if name in wanted and converted is None:
            found[name] = stored
        elif name in wanted and converted in order:
            i, ways[name] = order[converted]
            parts.setdefault(name, {}).setdefault(i, []).append(stored)
    joined = {name: _together(checkpoint, held, ways[name]) for name, held in parts.items()}
    return found, joined


def _way(operations: Iterable[object]) -> str | None:
    """How a conversion puts tensors together: one under the other, or an expert each and then one
    under the other; None for one that computes something.
    """  # noqa: D205
    from transformers.core_model_loading import Concatenate, MergeModulelist

    kinds = [(type(step), getattr(step, "dim", None)) for step in operations]
    if kinds == [(Concatenate, 0)]:
        return "stacked"
    merged = (MergeModulelist, 0)
    return "experts" if kinds in ([merged], [merged, (Concatenate, 1)]) else None


def _together(checkpoint: Checkpoint, held: dict[int, list[str]], way: str) -> tuple[Piece, ...]:
    from transformers.core_model_loading import dot_natural_key

    made, start = [], 0
    for _, names in sorted(held.items()):
        end = start + checkpoint.tensors[names[0]].shape[0]
        rows = slice(start, end)
        for expert, name in enumerate(sorted(names, key=dot_natural_key)):
            made.append(Piece(name, (rows,) if way == "stacked" else (expert, rows)))
        start = end
    return tuple(made)


def _meta_model(
    folder: Path, known: JsonObject, dtype: torch.dtype | str | None
) -> TransformersModel:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = (
            inner_config(known)
            if WHOLE in known
            else AutoConfig.from_pretrained(folder, local_files_only=True)
        )
        if getattr(config, "quantization_config", None):
            raise ModelError(
                f"{folder} is quantised (config.json has a quantization_config), and only plain "
                "weights can be streamed; load it whole."
            )
        if dtype == "auto":
            dtype = config.dtype or torch.float32
        with init_empty_weights(include_buffers=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise ModelError(f"cannot build the model of {folder}: {first_line(error)}") from None
    model.tie_weights()  # the context above gave each its own parameter
    return model.eval()


def _named(checkpoint: Checkpoint, name: str, model: TransformersModel) -> tuple[Piece, ...]:
    """Where a parameter's values lie under its own name, or an older one.

    Raises:  WeightsError: nowhere.
    """
    known, prefix = checkpoint.tensors, model.base_model_prefix
    bare = name.removeprefix(f"{prefix}.") if prefix else name
    for spelling in (name, bare, name.replace("lm_head.", "embed_out.")):
        if spelling in known:
            return (Piece(spelling),)
    raise WeightsError(
        f"{checkpoint.name} lacks {name}, or keeps it under a name that melens cannot "
        f"stream; load it whole, or check the index, or else: {what_to_do(known)}"
    )


def _require_shapes(
    checkpoint: Checkpoint, pieces: tuple[Piece, ...], shape: tuple[int, ...]
) -> None:
    for piece in pieces:
        stored, wanted = checkpoint.tensors.get(piece.name), _shape_of(shape, piece.part)
        if stored is None:
            raise WeightsError(f"{checkpoint.name} lacks {piece.name}; fetch it again.")
        if stored.shape != wanted:
            raise WeightsError(
                f"{stored} has shape {list(stored.shape)}; the config asks for {list(wanted)}."
            )
        _ = stored.dtype
    filled = sum(math.prod(checkpoint.tensors[piece.name].shape) for piece in pieces)
    if filled != math.prod(shape):  # what no piece fills would be whatever was in memory
        raise WeightsError(
            f"{checkpoint.name}: {pieces[0].name} and {len(pieces) - 1} others hold {filled:,} "
            f"numbers; the config asks for {math.prod(shape):,}. Fetch the model again."
        )


def _shape_of(shape: tuple[int, ...], part: tuple[int | slice, ...]) -> tuple[int, ...]:
    """Shape of ``x[part]`` for an ``x`` of that shape."""
    kept = [
        len(range(*index.indices(size)))
        for size, index in zip(shape, part, strict=False)
        if isinstance(index, slice)
    ]
    return (*kept, *shape[len(part) :])


def _read_buffers(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Buffers that were saved; all others were computed when the model was built."""
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            full = f"{path}.{name}"
            if buffer is None or full not in checkpoint.tensors:
                continue
            if name not in module._non_persistent_buffers_set:
                checkpoint.read(full, buffer)
