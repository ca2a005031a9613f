"""Which files are a folder's weights, as transformers has it, and safetensors headers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from melens.errors import ModelError, WeightsError
from melens.protocols import JsonObject
from melens.store import read_limited

HEADER_LIMIT = 100_000_000
"""Bytes; the format's own bound."""

MOST_DIMENSIONS = 32

MOST_VALUES = 1 << 60

BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""A value's size by the format's name; another name is taken as it is, its length unchecked."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it."""
    start: int
    """Byte of the file."""
    end: int


def read_header(read: Callable[[int, int], bytes], size: int, name: str) -> dict[str, TensorEntry]:
    """Every tensor by name, in the order of the header.

    Args:    read: (start, length) -> that many bytes of the file.
             size: the file's bytes; every count in the header is compared with them.
    Raises:  WeightsError: no header, fewer bytes than it announces, or tensors that overlap, leave
             bytes between them, or are as long as their shape does not say.
    """
    length = int.from_bytes(read(0, 8), "little") if size >= 8 else 0
    if not 0 < length <= min(size - 8, HEADER_LIMIT):
        raise WeightsError(f"{name} is truncated or no safetensors file ({size} bytes).")
    try:
        header = json.loads(read(8, length), object_pairs_hook=_once)
        about = header.pop("__metadata__", {})
        if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
            raise TypeError("the metadata are no texts")
        found = {key: _entry(item, 8 + length) for key, item in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise WeightsError(f"{name} has a corrupt safetensors header.") from None
    whole = max((entry.end for entry in found.values()), default=8 + length)
    if size < whole:
        raise WeightsError(f"{name} is truncated: {size} bytes of {whole}; fetch it again.")
    _require_cover(found, (8 + length, size), name)
    return found


def _once(pairs: list[tuple[str, object]]) -> JsonObject:
    """A JSON object none of whose names comes twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name comes twice")
    return made


def _entry(item: JsonObject, data: int) -> TensorEntry:
    """One tensor; ``data`` is where the numbers begin."""
    shape, dtype, (begin, end) = item["shape"], item["dtype"], item["data_offsets"]
    whole = [*shape, begin, end]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in whole):
        raise TypeError("sizes and places are whole numbers")
    if not isinstance(dtype, str) or len(shape) > MOST_DIMENSIONS or end < begin:
        raise ValueError("no such tensor")
    if max(shape, default=0) > MOST_VALUES or math.prod(n or 1 for n in shape) > MOST_VALUES:
        raise ValueError("no such size")
    if dtype in BITS and math.prod(shape) * BITS[dtype] != 8 * (end - begin):
        raise ValueError("another length than its shape")
    return TensorEntry(tuple(shape), dtype, data + begin, data + end)


def _require_cover(found: dict[str, TensorEntry], span: tuple[int, int], name: str) -> None:
    """Each byte of the data belongs to one tensor, as the format demands.

    Raises:  WeightsError: naming the tensors.
    """
    at, before = span[0], ""
    for key, entry in sorted(found.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start < at:
            raise WeightsError(
                f"{name} has a corrupt header: {before} and {key} lie on the same bytes."
            )
        if entry.start > at:
            break
        at, before = entry.end, key
    if at != span[1]:
        raise WeightsError(f"{name} has a corrupt header: the bytes from {at} on are no tensor's.")


SINGLE = "model.safetensors"

INDEX = "model.safetensors.index.json"

NAMED_BY_CONFIG = "transformers_weights"
"""A config may name its weights' file itself."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

SHOWN = 3


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a folder's weights."""

    folder: Path
    files: tuple[Path, ...]
    """Sorted by name."""
    placed: dict[str, str]
    """Tensor -> file as the index says; empty where there is no index."""
    main: str
    """The one file, or the index."""
    left: tuple[str, ...]
    """Other safetensors files and indexes of the folder; they are not read."""

    @property
    def note(self) -> str | None:
        """What to say where there was a choice."""
        if not self.left:
            return None
        more = f" and {len(self.left) - SHOWN} more" if len(self.left) > SHOWN else ""
        return (
            f"{self.folder.name}: the weights are those of {self.main}, as in transformers; "
            f"not read: {', '.join(self.left[:SHOWN])}{more}."
        )


def weight_files(folder: Path, config: JsonObject) -> WeightFiles:
    """A folder's weights: what the config names, else model.safetensors, else the index's shards.

    Raises:  WeightsError: none of these, or an index that names files elsewhere.
    """
    main = main_file(lambda name: (folder / name).is_file(), config)
    if main is None:
        raise WeightsError(_nothing(folder))
    placed = weight_map(read_json(folder / main), main) if main.endswith(".json") else {}
    names = sorted(set(placed.values())) or [main]
    found = [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]
    return WeightFiles(
        folder,
        tuple(folder / name for name in names),
        placed,
        main,
        tuple(sorted({file.name for file in found} - {main, *names})),
    )


def main_file(exists: Callable[[str], bool], config: JsonObject) -> str | None:
    """Name of the one file or the index; None where there is neither.

    Raises:  WeightsError: the config names a file elsewhere, or of another kind.
    """
    named = config.get(NAMED_BY_CONFIG)
    if named is not None:
        if not is_inside(named) or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise WeightsError(
                f"config.json says that the weights are in {named!r:.80}; only a safetensors file "
                "or index of the same folder is read."
            )
        return named
    return next((name for name in (SINGLE, INDEX) if exists(name)), None)


def weight_map(index: object, name: str) -> dict[str, str]:
    """Tensor -> file, of an index that was read.

    Raises:  WeightsError: no such map, or a file that is not beside the index.
    """
    table = index if isinstance(index, dict) else {}
    placed = table.get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise WeightsError(f"{name} has no weight_map; fetch it again.")
    if not isinstance(table.get("metadata"), dict):
        raise WeightsError(f"{name} has no metadata, which transformers asks for; fetch it again.")
    for file in placed.values():
        if not is_inside(file) or not file.endswith(".safetensors"):
            raise WeightsError(
                f"{name} names {file!r:.80}; only safetensors files of its own folder are read."
            )
    return placed


def is_inside(name: object) -> bool:
    """Whether a name that a file gives is that of a file beside it. A link there is followed: the
    hub's cache is made of them.
    """  # noqa: D205
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name:
        return False
    return PurePosixPath(name).name == name and name != ".."


def require_placed(
    tables: Mapping[str, Mapping[str, object]], placed: dict[str, str], main: str
) -> None:
    """Hold the files against the index. What an index forgot counts: transformers loads it too.

    What it names and no file holds (a tied unembedding) is missed only by a model that needs it.

    Raises:  WeightsError: one tensor in two files, or in another than the index says.
    """
    at: dict[str, str] = {}
    for file, table in tables.items():
        for name in table:
            if name in at:
                raise WeightsError(f"{name} is in {at[name]} and in {file}; keep one of them.")
            at[name] = file
    for name, file in placed.items():
        if at.get(name, file) != file:
            raise WeightsError(
                f"{main} says that {file} holds {name}, and {at[name]} does; fetch it again."
            )


def read_json(path: Path) -> Any:
    """A JSON file's content.

    Raises:  ModelError: no regular file, too large, or not JSON.
    """
    try:
        return json.loads(read_limited(path, HEADER_LIMIT).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        said = getattr(error, "strerror", None) or str(error)[:200]
        raise ModelError(f"cannot read {path}: {said}.") from None


def _nothing(folder: Path) -> str:
    """Why a folder without a main file has no weights to read."""
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    if found:
        shown = ", ".join(found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")
        return (
            f"{folder} holds neither {SINGLE} nor {INDEX}, only {shown}; rename the file that is "
            "the model, or fetch the index."
        )
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when loaded; "
            "convert them to safetensors first."
        )
    return f"{folder} holds no safetensors weights."
