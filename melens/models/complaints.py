"""What libraries raise over a damaged file, in words that name the file and the setting."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from melens.errors import ModelError
from melens.formatting import brief
from melens.models.weight_files import read_json
from melens.protocols import JsonObject

PATIENCE = 5.0
"""Seconds that looking for a setting may take; the error is said in any case."""

LARGE = 64 << 20
"""Bytes of files, or tensors' names, beyond which one attempt alone takes too long."""
MANY = 4096

TOKENIZER, SETTINGS, WORDS = "tokenizer.json", "tokenizer_config.json", "vocab.json"

VOCABULARIES = (TOKENIZER, "*vocab*", "*.model", "*.tiktoken", "tekken.json")
"""Files that hold the words of some tokenizer."""

BESIDE = (SETTINGS, "special_tokens_map.json", "added_tokens.json")
"""Files that say more of it."""

JSON_FILES = (TOKENIZER, WORDS, *BESIDE)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the words of a tokenizer, or says which one it has."""
    return any(True for kind in (*VOCABULARIES, SETTINGS) for _ in folder.glob(kind))


def first_line(error: BaseException, *, named: bool = False) -> str:
    """A library's complaint on one line, cut short; where it says nothing, its kind and place.

    Args:    named: put its kind in front in any case.
    """
    said, kind = " ".join(str(error).split())[:240], type(error).__name__
    if not said:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        return kind if trace is None else f"{kind} in {trace.tb_frame.f_code.co_name}"
    if isinstance(error, KeyError) and " " not in said:  # whose text is the key alone
        said = f"no entry {said}"
    return f"{kind}: {said}" if named else said


def with_setting(
    error: Exception, settings: Mapping[str, object], attempt: Callable[[JsonObject], object]
) -> str:
    """The complaint, with the setting that it is about: the one without which nothing is wrong.

    Where there is none, the one without which something else is.

    Args:    attempt: what failed, given other settings.
    """
    said = first_line(error, named=True)
    end, right, other = time.monotonic() + PATIENCE, [], []
    if any(key in str(error) for key in settings):
        return said
    for key in settings:
        if time.monotonic() > end:
            break
        try:
            attempt({name: value for name, value in settings.items() if name != key})
        except MemoryError:
            raise
        except Exception as now:  # anything, as at first
            same = (type(now), str(now)) == (type(error), str(error))
            if not same and key not in str(now):  # else the setting itself is missed now
                other.append(key)
            continue
        right.append(key)
    found = [f"{key} = {brief(settings[key], 40)}" for key in right or other]
    return f"{' or '.join(found)}; {said}" if 0 < len(found) <= 3 else said


def no_tokenizer(
    folder: Path, error: Exception, read: Callable[[Path], object] | None
) -> ModelError:
    """Why a folder's tokenizer cannot be read: which of its files, and what to do.

    Args:    error: what ``read`` raised on the folder; None = it is not to be tried again.
    """
    if not any(True for kind in VOCABULARIES for _ in folder.glob(kind)):
        return ModelError(
            f"{folder} has no tokenizer that can be read: it holds no {TOKENIZER}; put the files "
            "of the model's tokenizer there."
        )
    name, said = _broken(folder) or (None, "")
    if name is None:
        name, said = SETTINGS, _with_tokenizer_setting(folder, error, read)
        here = [n for n in BESIDE if (folder / n).is_file()]
        name = " or ".join(here) if here else TOKENIZER
    return ModelError(
        f"{folder} has no tokenizer that can be read: {name} is not right ({said.rstrip('.')}); "
        "fetch it again from where the model is."
    )


def broken_json(folder: Path, names: tuple[str, ...]) -> tuple[str, str] | None:
    """The first of a folder's files that is no JSON object, and why."""
    for name in names:
        if not (folder / name).is_file():
            continue
        try:
            found = read_json(folder / name)
        except ModelError as error:
            return name, str(error).removeprefix(f"cannot read {folder / name}: ")
        if not isinstance(found, dict):
            return name, "it is not a JSON object"
    return None


def _broken(folder: Path) -> tuple[str, str] | None:
    """A file that is wrong by itself, and why; None where each is right."""
    from tokenizers import Tokenizer

    if found := broken_json(folder, JSON_FILES):
        return found
    for path in sorted(folder.glob("*.jinja")):
        try:
            path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            return path.name, first_line(error)
    if (folder / TOKENIZER).is_file():
        try:
            Tokenizer.from_file(str(folder / TOKENIZER))
        except Exception as error:  # the library raises Exception itself
            return TOKENIZER, first_line(error)
        added = read_json(folder / TOKENIZER).get("added_tokens")
        if not isinstance(added, list):
            return TOKENIZER, "it has no list of added_tokens"
    return None


def _with_tokenizer_setting(
    folder: Path, error: Exception, read: Callable[[Path], object] | None
) -> str:
    said = first_line(error, named=True)
    if read is None or not (folder / SETTINGS).is_file():
        return said
    files = [p for p in folder.iterdir() if p.is_file() and p.suffix != ".safetensors"]
    if sum(path.stat().st_size for path in files) > LARGE:
        return said
    with tempfile.TemporaryDirectory() as made:
        copy = Path(made)
        try:
            for path in files:
                if path.name != SETTINGS:
                    (copy / path.name).symlink_to(path.resolve())
        except OSError:  # a system or a disk without links
            return said

        def attempt(settings: JsonObject) -> object:
            (copy / SETTINGS).write_text(json.dumps(settings), "utf-8")
            return read(copy)

        return with_setting(error, read_json(folder / SETTINGS), attempt)


WRAPPERS = {
    "_orig_mod.": ("torch.compile", "model._orig_mod.save_pretrained(folder)"),
    "module.": ("data parallelism", "model.module.save_pretrained(folder)"),
    "_fsdp_wrapped_module.": ("FSDP", "the full state dict"),
    "base_model.model.": ("PEFT", "model.merge_and_unload().save_pretrained(folder)"),
}


def what_to_do(names: Iterable[str]) -> str:
    """For a checkpoint that lacks a tensor: strip the wrapper's prefix, or fetch it again."""
    known = list(names)
    for prefix, (maker, instead) in WRAPPERS.items():
        if known and sum(name.startswith(prefix) for name in known) > len(known) / 2:
            return (
                f"its names begin with '{prefix}', as a model saved inside {maker} has them: save "
                f"what is inside ({instead}), or strip that prefix from the names in the files."
            )
    return "fetch it again."
