"""The header of a safetensors file: what it lists, and that all of it lies inside the file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from melens.errors import WeightsError

HEADER_LIMIT = 100_000_000
"""Bytes; the format's own bound."""
MOST_DIMENSIONS = 32
MOST_VALUES = 1 << 60
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""A value's size by the format's name; another name is taken as it is, its length unchecked."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it."""
    start: int
    """Byte of the file."""
    end: int


def read_header(read: Callable[[int, int], bytes], size: int, name: str) -> dict[str, Entry]:
    """Every tensor by name, in the order of the header.

    Args:    read: (start, length) -> that many bytes of the file.
             size: the file's bytes; every count in the header is held against them.
    Raises:  WeightsError: no header, fewer bytes than it announces, or tensors that overlap, leave
             bytes between them, or are as long as their shape does not say.
    """  # fmt: skip
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


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object none of whose names comes twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name comes twice")
    return made


def _entry(item: dict[str, Any], data: int) -> Entry:
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
    return Entry(tuple(shape), dtype, data + begin, data + end)


def _require_cover(found: dict[str, Entry], span: tuple[int, int], name: str) -> None:
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
