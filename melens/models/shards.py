"""A folder's safetensors files read tensor by tensor, row by row, without mapping them.

Memory-mapped pages would count as memory of the process; plain reads leave them to the system.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from melens.errors import WeightsError
from melens.models.origin import Sample, stride_of
from melens.models.weight_files import read_json, weight_files

CHUNK = 1 << 22
"""Values that are converted at a time: few enough to stay near the processor."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies."""

    name: str
    file: Path
    start: int
    """Byte of the file."""
    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it."""

    @property
    def itemsize(self) -> int:
        """Bytes a value."""
        return self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in the file.

        Raises:  WeightsError: one that is no plain number here (quantised weights).
        """
        if self.dtype not in DTYPES:
            raise WeightsError(
                f"{self.name} in {self.file.name} is stored as {self.dtype}, which cannot be "
                "streamed; use a checkpoint in float32, bfloat16 or float16."
            )
        return DTYPES[self.dtype]


class Checkpoint:
    """All tensors of a folder, by name; nothing is read but what is asked for."""

    def __init__(self, folder: Path) -> None:
        """Read every file's header.

        Raises:  WeightsError: a file that is missing or cut, or an index that does not fit.
        """
        self.folder = folder
        self.bytes_read = 0
        self._finite: set[str] = set()
        self._scratch = torch.empty(8 * CHUNK, dtype=torch.uint8)
        self.tensors: dict[str, Stored] = {}
        tables = weight_files(folder, read_json(folder / "config.json")).tables()
        self.files = list(tables)
        self.tensors = {
            name: Stored(name, file, entry.start, entry.shape, entry.dtype)
            for file, table in tables.items()
            for name, entry in table.items()
        }

    @property
    def bytes_stored(self) -> int:
        """Size of all files together."""
        return sum(file.stat().st_size for file in self.files)

    def identity(self) -> str:
        """Short hash of the files' names, sizes and times, and of the config."""
        stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in self.files]
        config = (self.folder / "config.json").read_bytes()
        return hashlib.sha256(repr(stats).encode() + config).hexdigest()[:16]

    def read(self, name: str, out: Tensor) -> None:
        """One whole tensor, into the memory of another, whatever its dtype and device.

        Args:    out: of the same shape, contiguous.
        Raises:  WeightsError: NaN or Inf in it, or the file ends too soon.
        """
        stored, flat = self.tensors[name], out.view(-1)
        for start in range(0, len(flat), CHUNK):
            part = flat[start : start + CHUNK]
            if stored.torch_dtype == part.dtype and part.device.type == "cpu":
                self._read_bytes(stored, start, part)
                continue
            raw = self._scratch[: len(part) * stored.itemsize].view(stored.torch_dtype)
            self._read_bytes(stored, start, raw)
            part.copy_(raw)
        if name not in self._finite:  # once is enough: every pass reads the same
            _require_finite(out, stored)
            self._finite.add(name)

    def rows(self, name: str, rows: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Some rows of a matrix, on the CPU.

        Raises:  WeightsError: as :meth:`read`.
        """
        stored = self.tensors[name]
        found = torch.empty((len(rows), stored.shape[1]), dtype=stored.torch_dtype)
        for at, row in enumerate(rows):
            self._read_bytes(stored, row * stored.shape[1], found[at])
        made = found.to(dtype)
        _require_finite(made, stored)
        return made

    def sample(self, name: str, dtype: torch.dtype) -> Sample:
        """What :func:`melens.models.origin.sample` would say of the tensor read in ``dtype``."""
        stored = self.tensors[name]
        count = math.prod(stored.shape)
        places = range(0, count, stride_of(count))
        found = torch.empty(len(places), dtype=stored.torch_dtype)
        for at, place in enumerate(places):
            self._read_bytes(stored, place, found[at : at + 1])
        return Sample(stored.shape, dtype, found.to(dtype).double())

    def _read_bytes(self, stored: Stored, place: int, into: Tensor) -> None:
        """Fill ``into`` with the values from the ``place``-th on."""
        array: Any = into.view(torch.uint8).numpy()
        count = array.size
        try:
            with stored.file.open("rb", buffering=0) as file:
                file.seek(stored.start + place * stored.itemsize)
                got = _fill(file, memoryview(array))
        except OSError as error:
            raise WeightsError(f"cannot read {stored.file}: {error.strerror}.") from None
        if got != count:
            raise WeightsError(
                f"{stored.file.name} ends inside {stored.name}: it is truncated; fetch it again."
            )
        self.bytes_read += count


def _fill(file: RawIOBase, view: memoryview) -> int:
    """Read until the view is full or the file ends."""
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])
        if not got:
            break
        done += got
    return done


def _require_finite(made: Tensor, stored: Stored) -> None:
    """Two numbers tell: both ends are NaN if any value is."""
    if not made.is_floating_point() or not made.numel():
        return
    low, high = torch.aminmax(made)
    if torch.isfinite(low) and torch.isfinite(high):
        return
    bad = int((~torch.isfinite(made)).sum())
    raise WeightsError(
        f"{stored.name} in {stored.file.name} holds {bad} NaN or Inf of {made.numel()} values; the "
        "checkpoint is damaged, or was saved in a dtype too small for it."
    )
