"""Hashes that tell apart what numbers depend on: facts, files and weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def digest(parts: Iterable[str | bytes | bytearray | memoryview], *, length: int = 16) -> str:
    """The first hex digits of the sha256 of parts, one behind the other; 64 are all."""
    made = hashlib.sha256()
    for part in parts:
        made.update(part.encode() if isinstance(part, str) else part)
    return made.hexdigest()[:length]


def hash_facts(facts: object) -> str:
    """Short hash of everything that numbers depend on, as plain values."""
    return digest([json.dumps(facts, sort_keys=True, default=str)])


def hash_tensors(labelled: Iterable[tuple[str, Tensor]], *, length: int = 16) -> str:
    """Hash of tensors and of what is said of each: its name, its shape and its dtype, or more."""
    pairs = ((label, tensor_bytes(value)) for label, value in labelled)
    return digest((part for pair in pairs for part in pair), length=length)


def tensor_bytes(value: Tensor) -> memoryview:
    """A tensor's bytes, in the order of its entries, to be hashed."""
    import torch  # not above: whoever writes a file need not have it loaded

    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
