"""GGUF files: converted once to a safetensors folder that loads in a second, or read as they are.

Every tensor is kept in the fewest bits that change none of its values: bfloat16 or float16 where
the file had them, float32 for what was dequantised.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from melens.errors import FetchError, ModelError
from melens.models.cache import building, cache_dir
from melens.models.checkpoint import read_folder
from melens.models.gguf_header import GGUFHeader, config_of, foreign, read_gguf_header
from melens.models.gguf_tensors import Conversion, narrowest, plan_conversion, tensors_of
from melens.models.weight_files import INDEX, read_json, weight_files
from melens.network import is_set
from melens.progress import progress_on, remark
from melens.protocols import JsonObject, PretrainedConfig, Tokenizer, TransformersModel
from melens.store import PAGE, digest, read_limited, write_atomically

EDGE = 1 << 20
"""Bytes hashed at each end of a file of the user's own, beside its size and time."""
SHARD = 1 << 30
"""Bytes of one safetensors file, which is also what waits in memory to be written."""
METHOD = 2
"""Of converting; copies that an older melens made may hold random numbers, and are not used."""
RECORD = "melens_copy.json"
"""In a converted copy: its files' sizes, and the names that the model gives itself."""


def no_cache() -> bool:
    """Whether ``MELENS_NO_CACHE`` (``--no-cache``) asks that no converted copy is kept."""
    return is_set("MELENS_NO_CACHE")


def converted_copy(path: Path) -> Path:
    """Folder of the converted copy of any ``.gguf`` file; converts on first use.

    Raises:  WeightsError: not a whole GGUF file, or of a kind transformers cannot read.
    """
    header = read_gguf_header(path)
    target = cache_dir() / "models" / f"{header.path.stem}-{_key(header)}"
    if not ((target / RECORD).is_file() and is_whole(target)):
        convert_gguf(path, target)
    return target


def convert_gguf(path: Path, target: Path) -> None:
    """Save model and tokenizer under ``target``, all or nothing, tensor by tensor.

    Raises:  WeightsError: as :func:`melens.models.gguf_tensors.plan_conversion`; FetchError: the
             cache cannot be written, or has no room.
    """
    plan = plan_conversion(read_gguf_header(path))
    tokenizer = read_gguf_tokenizer(path)
    remark(
        f"converting {path.name} once, to at most {_size(plan.n_bytes)} in {target} "
        "(--no-cache keeps nothing)"
    )
    with building(target) as folder:
        _require_room(folder, plan.n_bytes)
        counts = _write_shards(folder, _shown(plan))
        _finished_config(plan, counts).save_pretrained(folder)
        if plan.model.can_generate():
            plan.model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        _write_record(folder, plan.header)


def read_gguf_whole(path: Path) -> tuple[type[TransformersModel], JsonObject]:
    """The model's class, and what its ``from_pretrained`` takes in place of a folder.

    Raises:  WeightsError: as :func:`convert_gguf`.
    """
    plan = plan_conversion(read_gguf_header(path))
    made = {name: narrowest(value) for name, value in _shown(plan)}
    counts: dict[torch.dtype, int] = {}
    for value in made.values():
        counts[value.dtype] = counts.get(value.dtype, 0) + value.numel()
    return type(plan.model), {"config": _finished_config(plan, counts), "state_dict": made}


def read_gguf_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer that a GGUF's fields describe; None where it has no vocabulary.

    Raises:  WeightsError: transformers cannot read it.
    """
    from transformers import TOKENIZER_MAPPING, PreTrainedTokenizerFast

    header = read_gguf_header(path)
    if header.fields.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        return None
    # AutoTokenizer would read the whole file for this, by way of every word of its vocabulary
    kind: Any = TOKENIZER_MAPPING.get(type(config_of(header)), PreTrainedTokenizerFast)
    if kind is None or kind.__name__ == "MistralCommonBackend":
        kind = PreTrainedTokenizerFast
    with tempfile.TemporaryDirectory() as folder, header.path.open("rb") as file:
        # alone in a folder: files that lie beside the .gguf are another tokenizer's
        write_atomically(Path(folder) / "header.gguf", file.read(header.n_bytes))
        with foreign(header, "the tokenizer of "):
            return kind.from_pretrained(folder, gguf_file="header.gguf")


def is_whole(folder: Path) -> bool:
    """A converted copy whose files are as they were written; a torn one is made again."""
    record = _record(folder)
    sizes = record.get("files", {})
    damaged = not record and (folder / RECORD).exists()
    if damaged or not isinstance(sizes, dict):
        return False
    try:
        config = dict(read_json(folder / "config.json"))
        read_folder(weight_files(folder, config), config)
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (ModelError, OSError, ValueError, TypeError):
        return False


def given_names(path: Path) -> tuple[str, ...]:
    """What a ``.gguf`` file or a converted copy says the model is called; () where nothing."""
    if path.is_file():
        return read_gguf_header(path).names()
    names = _record(path).get("names")
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _finished_config(plan: Conversion, counts: dict[torch.dtype, int]) -> PretrainedConfig:
    """The config, with its class and the dtype that most values are kept in."""
    config = plan.model.config
    config.architectures = [type(plan.model).__name__]
    config.dtype = max(counts, key=lambda dtype: counts[dtype])
    return config


def _record(folder: Path) -> JsonObject:
    """What a copy says of itself; nothing where there is no record, or a damaged one."""
    try:
        found = json.loads(read_limited(folder / RECORD, PAGE))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_record(folder: Path, header: GGUFHeader) -> None:
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    record = {"from": header.name, "names": header.names(), "files": files}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> dict[torch.dtype, int]:
    """Write the tensors as they come, one file of ``SHARD`` bytes after the other.

    Returns: how many values are kept in each dtype.
    """
    from safetensors.torch import save_file

    waiting: dict[str, Tensor] = {}
    places: dict[str, int] = {}
    counts: dict[torch.dtype, int] = {}
    n_files = n_bytes = waits = 0

    def write() -> None:
        nonlocal n_files, waits
        save_file(waiting, folder / f"part{n_files}", metadata={"format": "pt"})
        waiting.clear()
        n_files, waits = n_files + 1, 0

    for name, value in tensors:
        kept = narrowest(value).contiguous()
        if waits and waits + kept.nbytes > SHARD:
            write()
        waiting[name], places[name] = kept, n_files
        waits, n_bytes = waits + kept.nbytes, n_bytes + kept.nbytes
        counts[kept.dtype] = counts.get(kept.dtype, 0) + kept.numel()
    write()
    _name_shards(folder, n_files, places, n_bytes)
    return counts


def _name_shards(folder: Path, n_files: int, places: dict[str, int], n_bytes: int) -> None:
    """The names that transformers gives them, and an index where they are several."""
    if n_files == 1:
        (folder / "part0").rename(folder / "model.safetensors")
        return
    names = [f"model-{n + 1:05}-of-{n_files:05}.safetensors" for n in range(n_files)]
    for n, name in enumerate(names):
        (folder / f"part{n}").rename(folder / name)
    index = {
        "metadata": {"total_size": n_bytes},
        "weight_map": {name: names[n] for name, n in places.items()},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", "utf-8")


def _shown(plan: Conversion) -> Iterator[tuple[str, Tensor]]:
    """The tensors; shows on stderr how many are done."""
    with progress_on("tensors", what=f"converting {plan.header.name}") as tick:
        for done, item in enumerate(tensors_of(plan), start=1):
            yield item
            tick(done, len(plan.needed))


def _require_room(folder: Path, n_bytes: int) -> None:
    """Refuse what the disk cannot hold, before it is full.

    Raises:  FetchError: with both sizes.
    """
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise FetchError(
            f"the converted copy needs {_size(n_bytes)}, and {_size(free)} are free in the cache "
            f"{cache_dir()}; set MELENS_CACHE, or use --no-cache."
        )


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def _key(header: GGUFHeader) -> str:
    """Tells files apart by sizes, times and ends; not by every byte."""

    def parts() -> Iterator[str | bytes]:
        yield str(METHOD)
        for path in header.files:
            stat = path.stat()
            yield json.dumps([stat.st_size, stat.st_mtime_ns])
            with path.open("rb") as file:
                yield file.read(EDGE)
                file.seek(max(0, stat.st_size - EDGE))
                yield file.read(EDGE)

    return digest(parts(), length=12)
