"""A checkpoint's tensors by name and row, from disk or by range; no model is ever built."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from melens.errors import FetchError, WeightsError
from melens.models.gguf_header import VOCABULARY, read_gguf_header, require_blocks
from melens.models.gguf_tensors import values
from melens.models.weight_files import read_header, read_json, require_placed, weight_files
from melens.protocols import JsonObject

PARTIAL = 206
"""HTTP status of a ranged answer."""


@runtime_checkable
class Blob(Protocol):
    """A file that can be read from any place."""

    name: str
    size: int
    stamp: int
    """When it was written, in nanoseconds; 0 where that is not known."""
    piece: int
    """Bytes that are best read at once."""

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes from ``start`` on, or raise."""
        ...

    def close(self) -> None:
        """Give back what is held; a later read takes it anew."""
        ...


class FileBlob:
    """A local file, read without mapping it: pages that were read are not this process's."""

    piece = 1 << 18
    """Small enough to stay in the processor's cache until it is used."""

    def __init__(self, path: Path) -> None:
        """Opens nothing yet.

        Raises:  WeightsError: there is no such file.
        """
        self._file: Any = None
        if not path.is_file():
            raise WeightsError(f"{path.name} is missing from {path.parent}; fetch it again.")
        self.path, self.name = path, path.name
        status = path.stat()
        self.size, self.stamp = status.st_size, status.st_mtime_ns

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Raises WeightsError where the file ends early or cannot be read."""
        try:
            if self._file is None:
                self._file = self.path.open("rb", buffering=0)
            self._file.seek(start)
            done = 0
            while done < len(buffer) and (got := self._file.readinto(buffer[done:])):
                done += got
        except OSError as error:
            raise WeightsError(f"cannot read {self.path}: {error.strerror}.") from None
        if done < len(buffer):
            raise WeightsError(f"{self.name} ends at byte {start + done}; fetch it again.")

    def close(self) -> None:
        """Give the file handle back; a later read opens it anew."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __del__(self) -> None:
        """A file that was refused halfway is given back too."""
        self.close()


class HttpBlob:
    """A file behind a URL whose server answers ranged requests, as the hub's does.

    Tested against a client that answers as a server would; never against the hub itself.
    """

    stamp = 0
    piece = 1 << 23
    """Every piece is a request, and a request costs as long as many bytes do."""

    def __init__(self, url: str, client: Any, headers: dict[str, str], name: str) -> None:
        """Asks for one byte, to learn the file's size.

        Args:    client: with ``get(url, headers=, follow_redirects=)``, as httpx' Client has.
        Raises:  FetchError: out of reach, or a server that does not answer by range.
        """
        self.name = name
        self._url, self._client, self._headers = url, client, headers
        said = self._get(0, 1).headers.get("content-range", "")
        total = said.rpartition("/")[2]
        if not total.isdigit():
            raise FetchError(f"the server of {name} does not say how large it is ({said!r}).")
        self.size = int(total)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Raises FetchError where the server gives something else than what was asked for."""
        got = self._get(start, len(buffer)).content
        if len(got) != len(buffer):
            raise FetchError(
                f"{self.name}: {len(got)} bytes came for {len(buffer)} asked at {start}; try again."
            )
        buffer[:] = got

    def close(self) -> None:
        """The client is not ours to close."""

    def _get(self, start: int, length: int) -> Any:
        headers = {**self._headers, "Range": f"bytes={start}-{start + length - 1}"}
        try:
            answer = self._client.get(self._url, headers=headers, follow_redirects=True)
        except Exception as error:  # each HTTP library has errors of its own
            raise FetchError(
                f"cannot read {self.name}: {type(error).__name__} {str(error)[:150]}"
            ) from None
        if answer.status_code != PARTIAL:
            raise FetchError(
                f"the server answered {answer.status_code} "
                f"for a part of {self.name}, not {PARTIAL}."
            )
        return answer


EDGE = 1 << 16
"""Bytes hashed at the end of every file, beside its header."""


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: rows of its last dimension, one after the other."""

    shape: tuple[int, ...]
    kind: str
    """``F32``, ``BF16``, ... or the name of a GGUF block format."""
    blob: Blob
    start: int
    row_bytes: int


@dataclass
class Checkpoint:
    """The tensors of a model's files, and what its config says."""

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
    _buffers: dict[int, bytearray] = field(default_factory=dict)

    def key(self, *, times: bool = False) -> str:
        """Short hash of the files' names, sizes, ends and tensor tables; not of every byte.

        Args:    times: of the files' times too, so that a file rewritten in place is another.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True, default=str).encode())
        for blob in self.blobs:
            digest.update(f"{blob.name} {blob.size} {blob.stamp if times else 0}".encode())
            edge = bytearray(min(EDGE, blob.size))
            blob.read_into(blob.size - len(edge), memoryview(edge))
            digest.update(edge)
        for name, stored in sorted(self.tensors.items()):
            digest.update(f"{name}{stored.shape}{stored.kind}{stored.start}".encode())
        return digest.hexdigest()[:16]

    def stored(self, name: str) -> Stored:
        """Where a tensor lies.

        Raises:  WeightsError: no such tensor, naming it and what should list it.
        """
        if name not in self.tensors:
            raise WeightsError(f"{self.where} lists no tensor {name}; fetch the model again.")
        return self.tensors[name]

    def vector(self, name: str, length: int) -> Float[Tensor, " length"]:
        """A whole one-dimensional tensor in float32, on the CPU.

        Raises:  WeightsError: missing, of another shape, or not finite.
        """
        stored = self.stored(name)
        if stored.shape != (length,):
            raise WeightsError(
                f"{name} in {stored.blob.name} has shape {stored.shape}, expected ({length},)."
            )
        found = self.rows(name, 0, 1)[0].float().clone()
        if not torch.isfinite(found).all():
            raise WeightsError(f"{name} in {stored.blob.name} holds NaN or Inf.")
        return found

    def rows(self, name: str, first: int, last: int, *, slot: int = 0) -> Tensor:
        """Rows ``first`` to ``last`` (not included) as (row, column), in their own dtype.

        Block formats come dequantised to float32. The tensor may share the buffer of its
        ``slot``: the next read into that slot overwrites it.

        Raises:  WeightsError: an unknown number format, or a file that ends early.
        """
        stored = self.stored(name)
        size = (last - first) * stored.row_bytes
        buffer = self._buffers.get(slot)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[slot] = bytearray(size)
        view = memoryview(buffer)[:size]
        stored.blob.read_into(stored.start + first * stored.row_bytes, view)
        self.bytes_read += size
        said = f"{name} in {stored.blob.name}"
        return values(stored.kind, view, last - first, name=said)

    def piece(self, name: str) -> int:
        """Rows of a tensor that make one piece."""
        stored = self.stored(name)
        return max(1, stored.blob.piece // stored.row_bytes)

    def close(self) -> None:
        """Give the files back; the buffers too."""
        for blob in self.blobs:
            blob.close()
        self._buffers.clear()


def read_folder(folder: Path, *, name: str) -> Checkpoint:
    """A folder of safetensors, in one file or in shards with an index.

    Raises:  WeightsError: a missing, truncated or pickled file, or an index that does not fit.
    """
    config = read_json(folder / "config.json")
    chosen = weight_files(folder, config)
    blobs = {file.name: FileBlob(file) for file in chosen.files}
    return from_blobs((name, config), blobs, placed=chosen.placed, main=chosen.main)


def from_blobs(
    model: tuple[str, JsonObject],
    blobs: Mapping[str, Blob],
    *,
    placed: dict[str, str],
    main: str,
    revision: str | None = None,
) -> Checkpoint:
    """The tensors of safetensors files, wherever they lie.

    Args:    model: its name and config. blobs: by file name. placed, main: as
             :class:`melens.models.weight_files.WeightFiles` has them.
    Raises:  WeightsError: a corrupt header, or files that do not fit the index.
    """
    tables = {file: _table(blob) for file, blob in blobs.items()}
    require_placed(tables, placed, main)
    tensors = {key: stored for table in tables.values() for key, stored in table.items()}
    return Checkpoint(
        model[0], "safetensors", model[1], tensors, tuple(blobs.values()), main, revision
    )


def _table(blob: Blob) -> dict[str, Stored]:
    """Where each tensor of a safetensors file lies, from its header."""

    def read(start: int, length: int) -> bytes:
        return _bytes(blob, start, length)

    return {
        name: Stored(
            entry.shape,
            entry.dtype,
            blob,
            entry.start,
            (entry.end - entry.start) // _rows(entry.shape),
        )
        for name, entry in read_header(read, blob.size, blob.name).items()
    }


def read_gguf(path: Path) -> Checkpoint:
    """A ``.gguf`` file, or all parts of a split one; its block formats are dequantised row by row,
    as they are read.

    Raises:  WeightsError: no whole GGUF file, or fields that do not fit its tensors.
    """  # noqa: D205
    header = read_gguf_header(path)
    require_blocks(header)
    blobs = {file: FileBlob(file) for file in header.files}
    config = {key: value for key, value in header.fields.items() if not key.startswith(VOCABULARY)}
    tensors = {
        name: Stored(item.shape, item.kind, blobs[item.file], item.start, item.n_bytes // item.rows)
        for name, item in header.tensors.items()
    }
    return Checkpoint(path.name, "gguf", config, tensors, tuple(blobs.values()), path.name)


def _rows(shape: tuple[int, ...]) -> int:
    """Rows of the last dimension; a vector is one."""
    return max(1, math.prod(shape[:-1]))


def _bytes(blob: Blob, start: int, length: int) -> bytes:
    found = bytearray(length)
    blob.read_into(start, memoryview(found))
    return bytes(found)
