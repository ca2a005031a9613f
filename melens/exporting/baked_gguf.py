"""A GGUF with changed tensors: all else of the file it was made of is copied as it is.

A tokenizer's fields can be copied, and only llama.cpp's own converter can make them: it tells a
BPE tokenizer's rules by a hash. So a GGUF is written of a model that is one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from melens.errors import ModelError, ResultError
from melens.formatting import brief
from melens.models.checkpoint import of_gguf
from melens.models.gguf_header import GGUFHeader, GGUFTensor, foreign, read_gguf_header
from melens.models.gguf_tensors import Conversion, plan_conversion, tensors_of
from melens.models.named import NAMED, joined
from melens.models.resolve import asked
from melens.protocols import Loadable
from melens.results.baked import Baked, baked_history

GGUF_FILE = "model.gguf"
FIELD = "melens.baked"
"""The field that keeps the changes, as JSON; no other program reads it."""
OWN = ("GGUF.", "split.", "general.architecture", FIELD)
"""Beginnings of fields that a new file has of its own."""
CLOSE = 1e-6
"""Largest difference, of the largest value, between a value that was to be written and what the
file gives: a gain without its offset is rounded once more."""
CHUNK = 1 << 24
"""Bytes that are compared at a time."""


@contextmanager
def source_gguf(model: Loadable) -> Iterator[GGUFHeader]:
    """The ``.gguf`` that a model is loaded from.

    Raises:  ModelError: it is no GGUF. WeightsError: it is damaged, or a part is missing.
    """
    found = asked(model) if isinstance(model, (str, Path)) else None
    if found is None or found.kind not in ("named", "gguf"):
        raise ModelError(
            f"{brief(model, 60) if found else 'a model object'} is no GGUF file, and the tokenizer "
            "fields of one are known to llama.cpp's converter alone: bake it with format hf, and "
            "run convert_hf_to_gguf.py of llama.cpp on that folder."
        )
    if found.kind == "gguf":
        yield read_gguf_header(found.path)
        return
    with joined(NAMED[found.name]) as path:
        yield read_gguf_header(path)


def baked_before(header: GGUFHeader) -> tuple[Baked, ...]:
    """What an earlier export wrote into the file.

    Raises:  ResultError: the field is not what melens writes.
    """
    found = header.fields.get(FIELD)
    if found is not None and not isinstance(found, str):
        raise ResultError(f"{FIELD} in {header.name} is not what melens writes; remove it.")
    return baked_history(found or "[]", f"{FIELD} in {header.name}")


@dataclass(frozen=True)
class Changed:
    """New values of one tensor."""

    values: Tensor
    """float32, in the file's order."""
    kind: str
    """``F32``, or the 16-bit format that the tensor had, where that holds the values."""

    @classmethod
    def of(cls, values: Tensor, kind: str) -> Changed:
        """A quantised tensor is written in float32: quantised again it would change everywhere."""
        half = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind)
        exact = half is not None and torch.equal(values.to(half).float(), values)
        return cls(values, kind if exact else "F32")


def write_gguf(
    header: GGUFHeader, values: Mapping[str, Tensor], baked: Sequence[Baked], folder: Path
) -> None:
    """Write ``model.gguf`` and read it again: the changed values, and the same bytes elsewhere.

    Args:    values: the new value of each changed parameter, by transformers' names.
    Raises:  ModelError: a parameter that is put together of several tensors, or that llama.cpp
             orders in a way that cannot be undone. WeightsError: a damaged file.
    """
    plan = plan_conversion(header)
    changed = {
        name: Changed.of(made, header.tensors[name].kind)
        for name, made in _in_the_files_order(plan, values)
    }
    _write(header, changed, _history(baked), folder / GGUF_FILE)
    written = read_gguf_header(folder / GGUF_FILE)
    _require_same(header, written, changed)
    _require_values(_only(plan_conversion(written), values), values)


def _history(baked: Sequence[Baked]) -> str:
    return json.dumps([made.model_dump(mode="json") for made in baked])


def _only(plan: Conversion, parameters: Mapping[str, Tensor]) -> Conversion:
    """The conversion of a few parameters alone.

    Raises:  ModelError: one of them is not one tensor's.
    """
    name = plan.header.name
    if plan.given is None:
        raise ModelError(
            f"transformers reads {name} as a whole, so which tensor a change belongs to is not "
            "known; bake it with format hf, and run llama.cpp's convert_hf_to_gguf.py."
        )
    given = {tensor: owner for tensor, owner in plan.given.items() if owner in parameters}
    for owner in parameters:
        if (count := list(given.values()).count(owner)) != 1:
            raise ModelError(
                f"{owner} is {count} tensors of {name}, and a change is written into one; bake it "
                "with format hf, and run llama.cpp's convert_hf_to_gguf.py."
            )
    return replace(plan, given=given)


Layout = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
LAYOUTS: tuple[Layout, ...] = (
    (lambda x: x, lambda x: x),
    (lambda x: x.transpose(0, -1), lambda x: x.transpose(0, -1)),  # GPT-2 keeps [neuron, d_model]
    (lambda x: x - 1, lambda x: x + 1),  # Gemma's gains without the 1
)
"""From the file's order to the model's, and back."""


def _in_the_files_order(
    plan: Conversion, values: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """New values of the file's tensors; where a value did not change, the file's own."""
    few = _only(plan, values)
    assert few.given is not None
    stored, tensor_of = of_gguf(plan.header), {owner: name for name, owner in few.given.items()}
    for owner, old in tensors_of(few):
        name, new = tensor_of[owner], values[owner].float()
        before = stored.whole(name).float()
        back = _back(before, old)
        if back is None or new.shape != old.shape:
            raise ModelError(
                f"llama.cpp keeps {name} in another order than transformers keeps {owner}; bake it "
                "with format hf, and run llama.cpp's convert_hf_to_gguf.py."
            )
        yield name, torch.where(back(new) == back(old), before, back(new)).contiguous()


def _back(stored: Tensor, model: Tensor) -> Callable[[Tensor], Tensor] | None:
    """How the model's order is turned into the file's; None where no layout gives it."""
    for there, back in LAYOUTS:
        made = there(stored) if stored.ndim < 3 else stored
        if made.shape == model.shape and torch.equal(made, model):
            return back
    return None


def _write(header: GGUFHeader, changed: Mapping[str, Changed], history: str, path: Path) -> None:
    with foreign(header):
        readers = [gguf.GGUFReader(file) for file in header.files]
        writer = gguf.GGUFWriter(path, str(header.fields["general.architecture"]))
        try:
            copy_fields(readers[0], writer)
            writer.add_string(FIELD, history)
            found = [_data(tensor, changed) for reader in readers for tensor in reader.tensors]
            for name, data, kind in found:
                writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for _, data, _ in found:
                writer.write_tensor_data(data)
        finally:
            writer.close()


def copy_fields(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    """All fields but an earlier history; an array without values has no type, and is left out."""
    for name, field in reader.fields.items():
        value = None if name.startswith(OWN) else field.contents()
        if value is None or value == []:
            continue
        if name == "general.alignment":
            writer.add_custom_alignment(value)
            continue
        array = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(name, value, field.types[0], field.types[-1] if array else None)


def _data(
    tensor: gguf.ReaderTensor, changed: Mapping[str, Changed]
) -> tuple[str, np.ndarray, gguf.GGMLQuantizationType]:
    """Name, what is written, and its format."""
    if (new := changed.get(tensor.name)) is None:
        return tensor.name, tensor.data, tensor.tensor_type
    kind = gguf.GGMLQuantizationType[new.kind]
    return tensor.name, gguf.quants.quantize(new.values.numpy(), kind), kind


def _require_same(header: GGUFHeader, written: GGUFHeader, changed: Mapping[str, Changed]) -> None:
    """Every unchanged tensor byte for byte, every changed one with its shape."""
    for name, one in header.tensors.items():
        other = written.tensors.get(name)
        same = other is not None and other.shape == one.shape
        if other is not None and same and name not in changed:
            same = other.kind == one.kind and all(map(bytes.__eq__, _bytes(one), _bytes(other)))
        if not same:
            raise ModelError(f"{name} of {header.name} could not be copied into a new file.")
    if lost := set(written.tensors) - set(header.tensors):
        raise ModelError(f"{min(lost)} is not in {header.name}.")
    fields = {
        n: v for n, v in header.fields.items() if not n.startswith((*OWN, "general.alignment"))
    }
    for name, value in fields.items():
        # an array without values has no type that it could be written with
        if value not in ([], None) and written.fields.get(name) != value:
            raise ModelError(f"the field {name} of {header.name} could not be copied.")


def _bytes(tensor: GGUFTensor) -> Iterator[bytes]:
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        for done in range(0, tensor.n_bytes, CHUNK):
            yield file.read(min(CHUNK, tensor.n_bytes - done))


def _require_values(plan: Conversion, values: Mapping[str, Tensor]) -> None:
    """What transformers makes of the written file is what was to be written."""
    for owner, found in tensors_of(plan):
        wanted = values[owner].float()
        off = float((found - wanted).abs().max())
        if not off <= CLOSE * max(1.0, float(wanted.abs().max())):
            raise ModelError(f"{owner} read from the new GGUF differs by {off:.2g}.")
