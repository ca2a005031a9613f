"""A checkpoint's tensors by name and row, from disk or by range; no model is ever built.

Files are read and not mapped: mapped pages would count as this process's memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from melens.errors import FetchError, MelensError, WeightsError
from melens.models.gguf_header import VOCABULARY, GGUFHeader, read_gguf_header, require_blocks
from melens.models.multimodal import WHOLE, own_name
from melens.models.origin import Sample, stride_of
from melens.models.weight_files import WeightFiles, read_header, require_placed
from melens.protocols import JsonObject
from melens.store import digest

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Stored as plain numbers; block formats are dequantised."""
PLAIN = {**FLOATS, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
"""With what a model's buffers may be."""
EDGE = 1 << 16
"""Bytes hashed at the end of every file, beside its header."""
LOCAL, REMOTE = 1 << 18, 1 << 23
"""Bytes that are best read at once: few enough to stay in the processor's cache until they are
used; and on a server, where a request costs as long as many bytes do."""
CHUNK = 1 << 22
"""Values that are converted at a time: few enough to stay near the processor."""
CONVERTED = -1
"""The slot of what is converted at once."""


class Blob:
    """A file that can be read from any place, on disk or on a server."""

    def __init__(
        self,
        path: Path | str,
        size: int,
        opened: Callable[[], Any],
        *,
        stamp: int | None = None,
    ) -> None:
        """Opens nothing yet.

        Args:    opened: gives a file to seek and read in. stamp: when it was written, in
                 nanoseconds; None for a file on a server.
        """
        self.path, self.name, self.size = path, Path(path).name, size
        self.stamp, self.piece = stamp or 0, REMOTE if stamp is None else LOCAL
        self._opened, self._file = opened, None
        self._failure: type[MelensError] = FetchError if stamp is None else WeightsError

    @classmethod
    def on_disk(cls, path: Path) -> Blob:
        """A local file.

        Raises:  WeightsError: there is no such file.
        """
        if not path.is_file():
            raise WeightsError(f"{path.name} is missing from {path.parent}; fetch it again.")
        status = path.stat()
        return cls(
            path, status.st_size, lambda: path.open("rb", buffering=0), stamp=status.st_mtime_ns
        )

    def read_into(self, start: int, buffer: memoryview, what: str) -> None:
        """Fill ``buffer`` with the bytes from ``start`` on.

        Raises:  WeightsError, of a server's file FetchError: it ends inside ``what`` or cannot be
                 read.
        """
        done = 0
        try:
            if self._file is None:
                self._file = self._opened()
            self._file.seek(start)
            while done < len(buffer) and (got := self._file.readinto(buffer[done:])):
                done += got
        except MemoryError:
            raise
        except Exception as error:  # each file system's client has errors of its own
            said = getattr(error, "strerror", None) or f"{type(error).__name__} {str(error)[:150]}"
            raise self._failure(f"cannot read {self.path}: {said}.") from None
        if done < len(buffer):
            raise self._failure(f"{self.name} ends inside {what}: it is truncated; fetch it again.")

    def read(self, start: int, length: int) -> bytes:
        """Some bytes of the header."""
        found = bytearray(length)
        self.read_into(start, memoryview(found), "its header")
        return bytes(found)

    def close(self) -> None:
        """Give the file back; a later read opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __del__(self) -> None:
        """A file that was refused halfway is given back too."""
        self.close()


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: rows of its last dimension, one after the other."""

    name: str
    shape: tuple[int, ...]
    kind: str
    """``F32``, ``BF16``, ... or the name of a GGUF block format."""
    blob: Blob
    start: int
    row_bytes: int

    @property
    def rows(self) -> int:
        """Rows of the last dimension; a vector is one."""
        return max(1, math.prod(self.shape[:-1]))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in the file.

        Raises:  WeightsError: one that is no plain number (quantised weights).
        """
        if self.kind not in PLAIN:
            raise WeightsError(
                f"{self} is stored as {self.kind}, which cannot be streamed; use a checkpoint in "
                "float32, bfloat16 or float16."
            )
        return PLAIN[self.kind]

    def __str__(self) -> str:
        """As shown in errors."""
        return f"{self.name} in {self.blob.name}"


@dataclass
class Checkpoint:
    """The tensors of a model's files, and what its config says; nothing is read unasked."""

    name: str
    """As shown: the folder's or file's name, a named model, a hub id."""
    kind: str
    """``safetensors`` or ``gguf``."""
    config: JsonObject
    tensors: dict[str, Stored]
    blobs: tuple[Blob, ...]
    where: str
    """What lists the tensors, for errors: the index, or the one file."""
    revision: str | None = None
    bytes_read: int = 0
    _finite: set[str] = field(default_factory=set)
    _buffers: dict[int, bytearray] = field(default_factory=dict)

    def key(self, *, times: bool = False) -> str:
        """Short hash of the files' names, sizes, ends and tensor tables; not of every byte.

        Args:    times: of the files' times too, so that a file rewritten in place is another.
        """
        return digest(self._identity(times=times))

    def _identity(self, *, times: bool) -> Iterator[str | bytearray]:
        yield json.dumps(self.config, sort_keys=True, default=str)
        for blob in self.blobs:
            yield f"{blob.name} {blob.size} {blob.stamp if times else 0}"
            edge = bytearray(min(EDGE, blob.size))
            blob.read_into(blob.size - len(edge), memoryview(edge), "its last bytes")
            yield edge
        for name, stored in sorted(self.tensors.items()):
            yield f"{name}{stored.shape}{stored.kind}{stored.start}"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor."""
        return {name: stored.shape for name, stored in self.tensors.items()}

    def stored(self, name: str) -> Stored:
        """Where a tensor lies.

        Raises:  WeightsError: no such tensor, naming it and what should list it.
        """
        if name not in self.tensors:
            raise WeightsError(f"{self.where} lists no tensor {name}; fetch the model again.")
        return self.tensors[name]

    def piece(self, name: str) -> int:
        """Rows of a tensor that make one piece."""
        stored = self.stored(name)
        return max(1, stored.blob.piece // stored.row_bytes)

    def rows(self, name: str, first: int, last: int, *, slot: int = 0) -> Tensor:
        """Rows ``first`` to ``last`` (not included) as (row, column), in their own dtype.

        Block formats come dequantised to float32. The tensor may share the buffer of its
        ``slot``: the next read into that slot overwrites it.

        Raises:  WeightsError: an unknown number format, or a file that ends early.
        """
        stored = self.stored(name)
        view = self._room(slot, (last - first) * stored.row_bytes)
        self._read(stored, first * stored.row_bytes, view)
        return _values(stored, view, last - first)

    def whole(self, name: str) -> Tensor:
        """One tensor in float32, in memory of its own.

        Raises:  WeightsError: as :meth:`rows`.
        """
        stored = self.stored(name)
        made = torch.empty((stored.rows, math.prod(stored.shape[-1:])))
        step = max(1, CHUNK // max(1, made.shape[1]))
        for first in range(0, stored.rows, step):
            last = min(first + step, stored.rows)
            made[first:last] = self.rows(name, first, last)
        return made.view(stored.shape)

    def vector(self, name: str, length: int) -> Tensor:
        """A whole one-dimensional tensor in float32.

        Raises:  WeightsError: missing, of another shape, or not finite.
        """
        stored = self.stored(name)
        if stored.shape != (length,):
            raise WeightsError(f"{stored} has shape {stored.shape}, expected ({length},).")
        found = self.whole(name)
        if not torch.isfinite(found).all():
            raise WeightsError(f"{stored} holds NaN or Inf.")
        return found

    def read(self, name: str, out: Tensor) -> None:
        """One whole tensor of plain numbers, into the memory of another of any dtype and device.

        Args:    out: of the same shape, contiguous.
        Raises:  WeightsError: NaN or Inf in it, or the file ends too soon.
        """
        stored, flat = self.stored(name), out.view(-1)
        for start in range(0, len(flat), CHUNK):
            part = flat[start : start + CHUNK]
            if stored.dtype == part.dtype and part.device.type == "cpu":
                self._fill(stored, start, part)
                continue
            room = self._room(CONVERTED, len(part) * stored.dtype.itemsize)
            raw = torch.frombuffer(room, dtype=stored.dtype)
            self._fill(stored, start, raw)
            part.copy_(raw)
        if name not in self._finite:  # once is enough: every pass reads the same
            _require_finite(out, stored)
            self._finite.add(name)

    def chosen(self, name: str, rows: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Some rows of a matrix of plain numbers, on the CPU.

        Raises:  WeightsError: as :meth:`read`.
        """
        stored = self.stored(name)
        found = torch.empty((len(rows), stored.shape[1]), dtype=stored.dtype)
        for at, row in enumerate(rows):
            self._fill(stored, row * stored.shape[1], found[at])
        made = found.to(dtype)
        _require_finite(made, stored)
        return made

    def sample(self, name: str, dtype: torch.dtype) -> Sample:
        """What :func:`melens.models.origin.sample` would say of the tensor read in ``dtype``."""
        stored = self.stored(name)
        count = math.prod(stored.shape)
        places = range(0, count, stride_of(count))
        found = torch.empty(len(places), dtype=stored.dtype)
        for at, place in enumerate(places):
            self._fill(stored, place, found[at : at + 1])
        return Sample(stored.shape, dtype, found.to(dtype).double())

    def close(self) -> None:
        """Give the files back; the buffers too."""
        for blob in self.blobs:
            blob.close()
        self._buffers.clear()

    def _room(self, slot: int, size: int) -> memoryview:
        """The memory of a slot, made larger where need be."""
        buffer = self._buffers.get(slot)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[slot] = bytearray(size)
        return memoryview(buffer)[:size]

    def _fill(self, stored: Stored, place: int, into: Tensor) -> None:
        """Fill ``into`` with the values from the ``place``-th on."""
        view = into.view(torch.uint8).numpy().data
        self._read(stored, place * stored.dtype.itemsize, view)

    def _read(self, stored: Stored, offset: int, view: memoryview) -> None:
        stored.blob.read_into(stored.start + offset, view, stored.name)
        self.bytes_read += len(view)


def read_folder(chosen: WeightFiles, config: JsonObject) -> Checkpoint:
    """A folder's safetensors, in one file or in shards with an index.

    Raises:  WeightsError: a missing or truncated file, or an index that does not fit.
    """
    blobs = {file.name: Blob.on_disk(file) for file in chosen.files}
    return read_blobs(
        blobs, config, name=str(chosen.folder), placed=chosen.placed, main=chosen.main
    )


def read_blobs(
    blobs: Mapping[str, Blob],
    config: JsonObject,
    *,
    name: str,
    placed: dict[str, str],
    main: str,
    revision: str | None = None,
) -> Checkpoint:
    """The tensors of safetensors files, wherever they lie.

    Args:    blobs: by file name. placed, main: as
             :class:`melens.models.weight_files.WeightFiles` has them.
    Raises:  WeightsError: a corrupt header, or files that do not fit the index.
    """
    tables = {file: read_header(blob.read, blob.size, file) for file, blob in blobs.items()}
    require_placed(tables, placed, main)
    tensors = {
        key: Stored(
            key,
            entry.shape,
            entry.dtype,
            blobs[file],
            entry.start,
            (entry.end - entry.start) // max(1, math.prod(entry.shape[:-1])),
        )
        for file, table in tables.items()
        for key, entry in table.items()
    }
    if WHOLE in config:
        inner = {own_name(key): stored for key, stored in tensors.items()}
        tensors = {key: stored for key, stored in inner.items() if key is not None}
    return Checkpoint(name, "safetensors", config, tensors, tuple(blobs.values()), main, revision)


def read_gguf(path: Path) -> Checkpoint:
    """A ``.gguf`` file, or all parts of a split one; its block formats are dequantised row by row,
    as they are read.

    Raises:  WeightsError: no whole GGUF file, or fields that do not fit its tensors.
    """  # noqa: D205
    header = read_gguf_header(path)
    require_blocks(header)
    found = of_gguf(header)
    found.name = found.where = path.name  # of a split file the part that was given
    return found


def of_gguf(header: GGUFHeader) -> Checkpoint:
    """The tensors of a GGUF whose header was read."""
    blobs = {file: Blob.on_disk(file) for file in header.files}
    config = {key: value for key, value in header.fields.items() if not key.startswith(VOCABULARY)}
    tensors = {
        name: Stored(
            name, item.shape, item.kind, blobs[item.file], item.start, item.n_bytes // item.rows
        )
        for name, item in header.tensors.items()
    }
    return Checkpoint(header.name, "gguf", config, tensors, tuple(blobs.values()), header.name)


def _values(stored: Stored, data: memoryview, rows: int) -> Tensor:
    """Stored bytes as numbers (row, column): plain ones in their own dtype, blocks in float32.

    Plain numbers share the memory of ``data``.

    Raises:  WeightsError: a format that is neither plain numbers nor one the gguf package decodes.
    """
    if stored.kind in FLOATS:
        return torch.frombuffer(data, dtype=FLOATS[stored.kind]).view(rows, -1)
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    unknown = WeightsError(
        f"{stored} is stored as {stored.kind}, which melens cannot read; it reads "
        f"{', '.join(FLOATS)} and GGUF block formats."
    )
    number = getattr(GGMLQuantizationType, stored.kind, None)
    if number is None:
        raise unknown
    try:
        return torch.from_numpy(
            dequantize(np.frombuffer(data, dtype=np.uint8).reshape(rows, -1), number)
        )
    except NotImplementedError:  # a format that the gguf package names and does not decode
        raise unknown from None


def _require_finite(made: Tensor, stored: Stored) -> None:
    """Two numbers tell: both ends are NaN if any value is."""
    if not made.is_floating_point() or not made.numel():
        return
    low, high = torch.aminmax(made)
    if torch.isfinite(low) and torch.isfinite(high):
        return
    raise not_finite(str(stored), made)


def not_finite(name: str, value: Tensor) -> WeightsError:
    """The error that says how many values of a weight are no numbers."""
    bad = int((~torch.isfinite(value)).sum())
    return WeightsError(
        f"{name} holds {bad} NaN or Inf of {value.numel()} values; the checkpoint is damaged, or "
        "was saved in a dtype too small for it."
    )
