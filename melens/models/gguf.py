"""GGUF files: checked, then converted once to a safetensors folder that loads in a second."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from melens.errors import WeightsError
from melens.models.cache import building, cache_dir

MAGIC = b"GGUF"
EDGE = 1 << 20
"""Bytes hashed at each end of a file of the user's own, beside its size and time."""


def converted_copy(path: Path) -> Path:
    """Folder of the converted copy of any ``.gguf`` file; converts on first use.

    Raises:  WeightsError: not a GGUF file, truncated, or of a kind transformers cannot read.
    """
    target = cache_dir() / "models" / f"{path.stem}-{_file_key(path)}"
    if not (target / "config.json").is_file():
        convert_gguf(path, target)
    return target


def convert_gguf(path: Path, target: Path) -> None:
    """Dequantise to float32 and save model and tokenizer under ``target``, all or nothing."""
    check_gguf(path)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise WeightsError(f"transformers cannot read {path.name}: {first[:200]}") from None
    _drop_quantizer(model)
    with building(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def check_gguf(path: Path) -> None:
    """Refuse what is not a whole GGUF file.

    Raises:  WeightsError: wrong magic, an unreadable header, or fewer bytes than it announces.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        magic = file.read(len(MAGIC))
    if magic != MAGIC:
        raise WeightsError(f"{path.name} is not a GGUF file (it starts with {magic!r}).")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        end = max((t.data_offset + t.n_bytes for t in reader.tensors), default=0)
        empty = not reader.tensors
    except Exception as error:  # the reader raises whatever a damaged header leads it to
        raise WeightsError(
            f"{path.name} is a corrupt or truncated GGUF file ({type(error).__name__}); "
            "fetch it again."
        ) from None
    if empty or end > size:
        raise WeightsError(f"{path.name} is truncated: {size} bytes of {end}; fetch it again.")


def _drop_quantizer(model: Any) -> None:
    """Leave only the float weights: the loader's quantizer refuses to be saved."""
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]


def _file_key(path: Path) -> str:
    stat = path.stat()
    digest = hashlib.sha256(json.dumps([stat.st_size, stat.st_mtime_ns]).encode())
    with path.open("rb") as file:
        digest.update(file.read(EDGE))
        file.seek(max(0, stat.st_size - EDGE))
        digest.update(file.read(EDGE))
    return digest.hexdigest()[:12]
