"""A GGUF's fields: held against its tensors, and made a config of."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from melens.errors import WeightsError
from melens.models.gguf_header import GGUFHeader

VOCABULARY = "tokenizer.ggml.tokens"
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
        yield from ((key, one) for one in (value if isinstance(value, list) else [value])
                    if isinstance(one, int))  # fmt: skip


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


def config_of(header: GGUFHeader) -> Any:
    """The config that transformers makes of the fields.

    It is given a small file of the fields and tensor names alone: its reader keeps an array for
    every word of a vocabulary, and sees one part of a split file only.

    Raises:  WeightsError: it cannot make one.
    """
    from transformers import AutoConfig

    with foreign(header), tempfile.TemporaryDirectory() as folder:
        write_fields(header, Path(folder) / "fields.gguf")
        config: Any = AutoConfig.from_pretrained(
            folder, gguf_file="fields.gguf", local_files_only=True
        )
    if (table := header.tensors.get("token_embd.weight")) is not None:
        config.vocab_size = table.shape[0]
    return config


def write_fields(header: GGUFHeader, path: Path) -> None:
    """A GGUF of the fields and tensor names alone, its tensors of one value each."""
    import numpy as np
    from gguf import GGUFValueType, GGUFWriter

    writer = GGUFWriter(path, architecture_of(header))
    # transformers asks some architectures for its length, which config_of sets right
    writer.add_key_value(VOCABULARY, ["-"], GGUFValueType.ARRAY, GGUFValueType.STRING)
    for key, value in header.fields.items():
        if key in ("general.architecture", VOCABULARY) or key.startswith("split."):
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
def foreign(header: GGUFHeader) -> Iterator[None]:
    """What transformers makes of fields that nobody has checked is a WeightsError, one line."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:  # it raises whatever the fields lead it to
        first = " ".join(str(error).split())[:200] or type(error).__name__
        raise WeightsError(f"transformers cannot read {header.name}: {first}") from None
