"""The header of a GGUF file, bounded by the bytes that are left; its fields made a config of."""

from __future__ import annotations

import itertools
import math
import re
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from melens.errors import WeightsError
from melens.protocols import JsonObject, PretrainedConfig

MAGIC = b"GGUF"
VERSIONS = (2, 3)
LIMIT = 200_000_000
"""Bytes that a header may have; one with a vocabulary of 260,000 tokens has about 10 million."""
STRING, ARRAY = 8, 9
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Value types of a fixed size, as the struct module spells them."""
MOST_FIELDS, MOST_TENSORS = 1 << 16, 1 << 17
MOST_VALUES = {True: 1 << 22, False: 1 << 16}
"""Values an array may have: of a vocabulary, and of anything else."""
LONGEST = {True: 1 << 12, False: 1 << 22}
"""Bytes a string may have: one of many, and one alone (a chat template)."""
LONGEST_NAME, MOST_DIMS, ALIGNMENT = 512, 4, 32
VOCABULARY = "tokenizer."
FIRST_READ = 1 << 20


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies."""

    name: str
    shape: tuple[int, ...]
    """As torch orders it: the last dimension is the one whose values lie side by side."""
    kind: str
    """``F32``, ``BF16``, ``Q4_K``, ...: the format's name in the gguf package."""
    file: Path
    start: int
    n_bytes: int

    @property
    def rows(self) -> int:
        """Rows of the last dimension; a vector is one."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True)
class GGUFHeader:
    """A GGUF's fields and tensor table; of a split file those of all parts together."""

    path: Path
    """The file with the fields: the first part."""
    files: tuple[Path, ...]
    fields: JsonObject
    """A vocabulary's arrays are left out: nobody here asks for them."""
    types: dict[str, tuple[int, int | None]]
    """Of each field: its value type, and of an array that of its values."""
    tensors: dict[str, GGUFTensor]
    n_bytes: int
    """Of the header of ``path``, up to its first tensor."""

    @property
    def name(self) -> str:
        """As shown in errors."""
        return self.path.name

    def names(self) -> tuple[str, ...]:
        """What the file says the model is called, the most exact name first."""
        said = {key: value for key, value in self.fields.items() if isinstance(value, str)}
        address = said.get("general.repo_url") or said.get("general.source.url") or ""
        repository = re.search(r"huggingface\.co/([^/\s]+/[^/\s?#]+)", address)
        basename, size, finetune = (
            said.get(f"general.{part}", "") for part in ("basename", "size_label", "finetune")
        )
        orders = ((basename, size, finetune), (basename, finetune, size)) if basename else ()
        made = [
            repository[1] if repository else "",
            said.get("general.name", ""),
            *("-".join(filter(None, order)) for order in orders),
        ]
        return tuple(dict.fromkeys(filter(None, made)))


def read_gguf_header(path: Path) -> GGUFHeader:
    """Fields and tensor table of a ``.gguf`` file; of a split one all parts', which lie beside it.

    Raises:  WeightsError: not a GGUF file, a damaged header, fewer bytes than it announces, or a
             part of a split file whose other parts are missing; naming what.
    """
    first = _part(path)
    count = first.fields.get("split.count", 1)
    if not isinstance(count, int) or count < 2:
        if not first.tensors:
            raise WeightsError(f"{path.name} holds no tensors; fetch it again.")
        return first
    return _joined([_part(part) for part in _parts(path, first, count)], count)


def _parts(path: Path, header: GGUFHeader, count: int) -> list[Path]:
    """All files of a split GGUF.

    Raises:  WeightsError: some are missing, or the name says nothing of where they are.
    """
    number = header.fields.get("split.no")
    found = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", path.name, re.IGNORECASE)
    if not found or int(found[3]) != count or number != int(found[2]) - 1:
        raise WeightsError(
            f"{path.name} is one of {count} parts of a split GGUF, but its name does not say "
            f"which; call the parts NAME-00001-of-{min(count, 99999):05}.gguf and so on, or join "
            "them (llama-gguf-split --merge)."
        )
    parts = [
        path.with_name(f"{found[1]}-{n:05}-of-{found[3]}{found[4]}") for n in range(1, count + 1)
    ]
    if missing := [part.name for part in parts if not part.is_file()]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise WeightsError(
            f"{path.name} is part {int(found[2])} of {count} of a split GGUF, and "
            f"{', '.join(missing[:3])}{more} is not beside it; fetch all parts into one folder."
        )
    return parts


def _joined(parts: list[GGUFHeader], count: int) -> GGUFHeader:
    tensors: dict[str, GGUFTensor] = {}
    for number, part in enumerate(parts):
        said = part.fields.get("split.no"), part.fields.get("split.count")
        if said != (number, count):
            raise WeightsError(
                f"{part.name} says that it is part {said[0]} (from 0) of {said[1]}; its name says "
                f"part {number} of {count}. Fetch the parts of one model into one folder."
            )
        if twice := sorted(set(tensors) & set(part.tensors)):
            raise WeightsError(f"{part.name} holds {twice[0]}, which another part holds too.")
        tensors |= part.tensors
    first = parts[0]
    total = first.fields.get("split.tensors.count", len(tensors))
    if total != len(tensors) or not tensors:
        raise WeightsError(
            f"the {count} parts of {first.name} hold {len(tensors)} tensors of {total}; "
            "fetch them again."
        )
    files = tuple(part.path for part in parts)
    return GGUFHeader(first.path, files, first.fields, first.types, tensors, first.n_bytes)


class _Bytes:
    """The beginning of a file, read as it is needed; refuses whatever goes beyond its end."""

    def __init__(self, file: BinaryIO, name: str, size: int) -> None:
        self.name, self.size, self.at = name, size, 0
        self._file, self._seen = file, bytearray()

    @property
    def left(self) -> int:
        return self.size - self.at

    def bad(self, what: str) -> WeightsError:
        return WeightsError(
            f"{self.name} is a corrupt or truncated GGUF file: {what} (at byte {self.at} of "
            f"{self.size}); fetch it again."
        )

    def bound(self, count: int, least: int, most: int, what: str) -> None:
        """Refuse a count whose smallest values need more bytes than are left, or that is absurd."""
        if count * least > self.left or count > most:
            raise self.bad(f"it announces {count} {what}")

    def take(self, length: int, what: str) -> bytes:
        """The next bytes."""
        end = self.at + length
        self._see(end, what)
        with memoryview(self._seen) as seen:
            made = bytes(seen[self.at : end])
        self.at = end
        return made

    def number(self, code: str, what: str) -> int:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def pass_strings(self, count: int, what: str) -> None:
        """Go behind so many strings: a vocabulary has hundreds of thousands."""
        at, length_of = self.at, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > len(self._seen):
                self._see(at + 8, what)
            (length,) = length_of(self._seen, at)
            at += 8 + length
            if length > LONGEST[True] or at > self.size:
                self.at = at - length
                raise self.bad(f"it announces a string of {length} bytes in {what!r}")
        self._see(at, what)
        self.at = at

    def _see(self, end: int, what: str) -> None:
        """Have the bytes before ``end`` at hand."""
        if end > self.size:
            raise self.bad(f"it ends inside {what!r}")
        if end > LIMIT:
            raise self.bad(f"its header is longer than {LIMIT} bytes")
        if end > len(self._seen):
            wanted = max(end, 2 * len(self._seen), FIRST_READ)
            self._seen += self._file.read(wanted - len(self._seen))
        if end > len(self._seen):
            raise self.bad(f"it ends inside {what!r}")

    def string(self, longest: int, what: str) -> str:
        length = self.number("Q", what)
        self.bound(length, 1, longest, f"bytes of {what}")
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError:
            raise self.bad(f"{what} is not UTF-8") from None


def _part(path: Path) -> GGUFHeader:
    """One file alone.

    Raises:  WeightsError: as :func:`read_gguf_header`.
    """
    if not path.is_file():
        raise WeightsError(f"there is no file {path}; give a .gguf file.")
    try:
        with path.open("rb") as file:
            return _read(path, _Bytes(file, path.name, path.stat().st_size))
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}.") from None


def _read(path: Path, data: _Bytes) -> GGUFHeader:
    magic = data.take(min(len(MAGIC), data.size), "its first bytes")
    if magic != MAGIC:
        raise WeightsError(f"{path.name} is not a GGUF file (it starts with {magic!r}).")
    version = data.number("I", "its version")
    if version == 1 or version & 0xFFFF == 0 < version:
        raise WeightsError(
            f"{path.name} is a GGUF file of version 1 or of a big-endian machine; convert it again."
        )
    if version not in VERSIONS:
        raise data.bad(f"it says that its version is {version}")
    n_tensors, n_fields = (data.number("Q", "its counts") for _ in range(2))
    data.bound(n_tensors, 24, MOST_TENSORS, "tensors")
    data.bound(n_fields, 13, MOST_FIELDS, "fields")
    fields, types = _fields(data, n_fields)
    infos = [_info(data) for _ in range(n_tensors)]
    alignment = fields.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment % 8:
        raise data.bad(f"an alignment of {alignment!r}")
    start = -(-data.at // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, dims, kind, offset in infos:
        if name in tensors:
            raise data.bad(f"it lists {name!r} twice")
        if offset % alignment:
            raise data.bad(f"{name!r} does not begin at a multiple of {alignment} bytes")
        tensors[name] = _tensor(data, path, (name, dims, kind), start + offset)
    _require_apart(data, tensors.values())
    return GGUFHeader(path, (path,), fields, types, tensors, data.at)


def _fields(data: _Bytes, count: int) -> tuple[JsonObject, JsonObject]:
    fields: JsonObject = {}
    types: dict[str, tuple[int, int | None]] = {}
    seen: set[str] = set()
    for _ in range(count):
        key = data.string(LONGEST_NAME, "a field's name")
        if key in seen:
            raise data.bad(f"it gives {key!r} twice")
        seen.add(key)
        kind = data.number("I", key)
        if kind == ARRAY:
            inner, values = _array(data, key)
            if values is not None:
                fields[key], types[key] = values, (kind, inner)
        else:
            fields[key], types[key] = _value(data, kind, key), (kind, None)
    return fields, types


def _value(data: _Bytes, kind: int, key: str) -> str | float:
    if kind == STRING:
        return data.string(LONGEST[False], key)
    if kind not in SCALARS:
        raise data.bad(f"{key!r} has the unknown type {kind}")
    code = f"<{SCALARS[kind]}"
    return struct.unpack(code, data.take(struct.calcsize(code), key))[0]


def _array(data: _Bytes, key: str) -> tuple[int, list[str] | list[float] | None]:
    """The type of the values, and the values; None for a vocabulary's, which are passed over."""
    kind, count = data.number("I", key), data.number("Q", key)
    if kind != STRING and kind not in SCALARS:
        raise data.bad(f"{key!r} is an array of the unknown type {kind}")
    least = 8 if kind == STRING else struct.calcsize("<" + SCALARS[kind])
    vocabulary = key.startswith(VOCABULARY)
    data.bound(count, least, MOST_VALUES[vocabulary], f"values of {key!r}")
    if kind != STRING:
        raw = data.take(count * least, key)
        return kind, None if vocabulary else list(struct.unpack(f"<{count}{SCALARS[kind]}", raw))
    if vocabulary:
        data.pass_strings(count, key)
        return kind, None
    return kind, [data.string(LONGEST[True], key) for _ in range(count)]


def _info(data: _Bytes) -> tuple[str, tuple[int, ...], int, int]:
    """Name, dimensions as torch orders them, format and offset of one tensor."""
    name = data.string(LONGEST_NAME, "a tensor's name")
    n_dims = data.number("I", name)
    if not 0 < n_dims <= MOST_DIMS:
        raise data.bad(f"{name!r} has {n_dims} dimensions")
    dims = [data.number("Q", name) for _ in range(n_dims)]
    return name, tuple(reversed(dims)), data.number("I", name), data.number("Q", name)


def _tensor(
    data: _Bytes, path: Path, info: tuple[str, tuple[int, ...], int], start: int
) -> GGUFTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name, shape, number = info
    try:
        kind = GGMLQuantizationType(number)
        block, size = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise data.bad(f"{name!r} is stored in the unknown format {number}") from None
    count = math.prod(shape)
    if not count or shape[-1] % block:
        raise data.bad(f"{name!r} has the shape {list(shape)}, which {kind.name} cannot have")
    n_bytes = count // block * size
    if start + n_bytes > data.size:
        raise WeightsError(
            f"{path.name} is truncated: {data.size} bytes of {start + n_bytes} ({name!r}); "
            "fetch it again."
        )
    return GGUFTensor(name, shape, kind.name, path, start, n_bytes)


def _require_apart(data: _Bytes, tensors: Iterable[GGUFTensor]) -> None:
    """Refuse two tensors on the same bytes."""
    placed: list[GGUFTensor] = sorted(tensors, key=lambda tensor: tensor.start)
    for one, other in itertools.pairwise(placed):
        if one.start + one.n_bytes > other.start:
            raise data.bad(f"{one.name!r} and {other.name!r} lie on the same bytes")


TOKENS = "tokenizer.ggml.tokens"
EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")


def architecture_of(header: GGUFHeader) -> str:
    """``general.architecture``.

    Raises:  WeightsError: there is none.
    """
    found = header.fields.get("general.architecture")
    if not isinstance(found, str) or not found:
        raise WeightsError(
            f"{header.name} has no general.architecture, so nobody can tell what model it is; "
            "convert it again, or give the first part of a split GGUF."
        )
    return found


def require_blocks(header: GGUFHeader) -> None:
    """Refuse fields that do not fit the tensors: the number of blocks, and every other size.

    Raises:  WeightsError: naming the field, or the first block that is missing or not counted.
    """
    arch = architecture_of(header)
    count = header.fields.get(f"{arch}.block_count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise WeightsError(f"{header.name} has no {arch}.block_count; convert it again.")
    found = {int(m[1]) for name in header.tensors if (m := re.match(r"blk\.(\d{1,9})\.", name))}
    missing = next((n for n in range(len(found) + 1) if n not in found), 0)
    if missing < count:
        raise WeightsError(
            f"{header.name} lacks tensors: block {missing} has none (blk.{missing}.*), and its "
            f"block_count is {count}; fetch it again."
        )
    if beyond := [n for n in found if n >= count]:
        raise WeightsError(
            f"{header.name} holds tensors of block {min(beyond)}, but its block_count is {count}; "
            "they would be left out. Convert it again."
        )
    most = max(len(header.tensors), *(max(item.shape) for item in header.tensors.values()))
    for key, value in _sizes(header, arch):
        if not 0 <= value <= most:
            raise WeightsError(
                f"{header.name} says {key} is {value}, and the longest side of its tensors is "
                f"{most}; fetch it again, or convert it again."
            )


def _sizes(header: GGUFHeader, arch: str) -> Iterator[tuple[str, int]]:
    """Fields that say how large or how many something is; lengths of texts are left out."""
    for key, value in header.fields.items():
        if not key.startswith(f"{arch}.") or not re.search(r"_(count|length|size|count_kv)$", key):
            continue
        if "context_length" in key or "temperature_length" in key:
            continue
        yield from (
            (key, one)
            for one in (value if isinstance(value, list) else [value])
            if isinstance(one, int)
        )


def require_fields(header: GGUFHeader, arch: str) -> None:
    """Fields that no shape would betray: transformers would take the family's usual values."""
    wanted = ["embedding_length", "attention.head_count"]
    if header.fields.get(f"{arch}.expert_count"):
        wanted.append("expert_used_count")
    missing = [f"{arch}.{name}" for name in wanted if f"{arch}.{name}" not in header.fields]
    if not any(f"{arch}.{name}" in header.fields for name in EPSILONS):
        missing.append(f"{arch}.{EPSILONS[0]}")
    if missing:
        raise WeightsError(
            f"{header.name} has no {', '.join(missing)}: without it the model would be another. "
            "Convert it again."
        )


def config_of(header: GGUFHeader) -> PretrainedConfig:
    """The config that transformers makes of the fields.

    It is given a small file of the fields and tensor names alone: its reader keeps an array for
    every word of a vocabulary, and sees one part of a split file only.

    Raises:  WeightsError: it cannot make one.
    """
    from transformers import AutoConfig

    with foreign(header), tempfile.TemporaryDirectory() as folder:
        write_fields(header, Path(folder) / "fields.gguf")
        config = AutoConfig.from_pretrained(folder, gguf_file="fields.gguf", local_files_only=True)
    if (table := header.tensors.get("token_embd.weight")) is not None:
        config.vocab_size = table.shape[0]
    return config


def write_fields(header: GGUFHeader, path: Path) -> None:
    """A GGUF of the fields and tensor names alone, its tensors of one value each."""
    import numpy as np
    from gguf import GGUFValueType, GGUFWriter

    writer = GGUFWriter(path, architecture_of(header))
    # transformers asks some architectures for its length, which config_of sets right
    writer.add_key_value(TOKENS, ["-"], GGUFValueType.ARRAY, GGUFValueType.STRING)
    for key, value in header.fields.items():
        if key in ("general.architecture", "general.alignment", TOKENS) or key.startswith("split."):
            continue
        kind, inner = header.types[key]
        sub_type = None if inner is None else GGUFValueType(inner)
        if value != []:
            writer.add_key_value(key, value, GGUFValueType(kind), sub_type)
    for name in header.tensors:
        writer.add_tensor(name, np.zeros(1, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def foreign(header: GGUFHeader, part: str = "") -> Iterator[None]:
    """What transformers makes of fields that nobody has checked is a WeightsError, one line.

    Args:    part: what of the file is read, as "the tokenizer of "; "" = all of it.
    """
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:  # it raises whatever the fields lead it to
        first = " ".join(str(error).split())[:200] or type(error).__name__
        raise WeightsError(f"transformers cannot read {part}{header.name}: {first}") from None
