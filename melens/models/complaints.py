"""What libraries raise over a damaged file, in words that name the file and the setting."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from melens.errors import ModelError
from melens.formatting import brief
from melens.models.weight_files import read_json

PATIENCE = 5.0
"""Seconds that looking for a setting may take; the error is said in any case."""

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"

TOKENIZER_FILES = (TOKENIZER, SETTINGS, "vocab.json", "tokenizer.model")

VOCABULARIES = (TOKENIZER, "*vocab*", "*.model", "*.tiktoken", "tekken.json")

JSON_FILES = (TOKENIZER, SETTINGS, "vocab.json", "special_tokens_map.json", "added_tokens.json")


def first_line(error: Exception) -> str:
    """A library's complaint on one line, cut short."""
    said = " ".join(str(error).split())[:240]
    if isinstance(error, KeyError) and " " not in said:  # whose text is the key alone
        return f"no entry {said}"
    return said or type(error).__name__


def with_setting(
    error: Exception, settings: Mapping[str, Any], attempt: Callable[[dict[str, Any]], Any]
) -> str:
    """The complaint, with the setting that it is about: the one without which it is not made.

    Args:    attempt: what failed, given other settings.
    """
    said = f"{type(error).__name__}: {first_line(error)}"
    end, found = time.monotonic() + PATIENCE, []
    for key in settings:
        if key in str(error):
            return said
    for key in settings:
        if time.monotonic() > end:
            break
        try:
            attempt({name: value for name, value in settings.items() if name != key})
        except Exception as other:  # anything, as at first
            same = (type(other), str(other)) == (type(error), str(error))
            if same or key in str(other):  # or the setting itself is missed now
                continue
        found.append(f"{key} = {brief(settings[key], 40)}")
    return f"{' or '.join(found)}; {said}" if 0 < len(found) <= 3 else said


def no_tokenizer(folder: Path, error: Exception, read: Callable[[Path], Any]) -> ModelError:
    """Why a folder's tokenizer cannot be read: which of its files, and what to do.

    Args:    error: what ``read`` raised on the folder.
    """
    if not any(True for kind in VOCABULARIES for _ in folder.glob(kind)):
        return ModelError(
            f"{folder} has no tokenizer that can be read: it holds no {TOKENIZER}; put the files "
            "of the model's tokenizer there."
        )
    name, said = _broken(folder) or (None, "")
    if name is None:
        name, said = SETTINGS, _with_tokenizer_setting(folder, error, read)
        others = [n for n in JSON_FILES if n not in (TOKENIZER, SETTINGS, "vocab.json")]
        here = [n for n in (SETTINGS, *others) if (folder / n).is_file()]
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


def _with_tokenizer_setting(folder: Path, error: Exception, read: Callable[[Path], Any]) -> str:
    if not (folder / SETTINGS).is_file():
        return f"{type(error).__name__}: {first_line(error)}"
    with tempfile.TemporaryDirectory() as made:
        copy = Path(made)
        for path in folder.iterdir():
            if path.is_file() and path.name != SETTINGS and path.suffix != ".safetensors":
                (copy / path.name).symlink_to(path.resolve())

        def attempt(settings: dict[str, Any]) -> Any:
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
