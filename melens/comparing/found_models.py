"""Which models are on this machine: named ones, the hub's cache, folders, GGUF files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from melens.errors import ModelError, ModelNotFoundError
from melens.models.cache import cache_dir
from melens.models.named import NAMED, on_this_machine
from melens.models.resolve import asked
from melens.results.census import Kind

DEEPEST = 6
"""Folders below the one given that are looked into."""
MOST = 10_000
"""Models in one place; more is a mistake in the path."""
REPOSITORY = re.compile(r"models--(?:(.+?)--)?(.+)")
LATER_PART = re.compile(r"-(\d{5})-of-\d{5}\.gguf$", re.IGNORECASE)
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class FoundModel:
    """A model, and what the other functions are given for it."""

    name: str
    """As the table calls it; what it is published under, where its place says so."""
    kind: Kind
    model: str


def find_models(places: Sequence[str | Path] = ()) -> list[FoundModel]:
    """Every model in these places, each once, in the order of places and names.

    Args:    places: named models, hub ids, model folders, ``.gguf`` files, and folders of those
             (a hub's cache too). () = the hub's cache, and what melens' own cache holds.
    Returns: what ``scan`` and ``load`` take, with a name that no other has.
    Raises:  ModelNotFoundError: a place that is not there, or a misspelt name. ModelError: a
             folder without a model, another file, or no model at all.
    """
    if isinstance(places, (str, Path)):
        places = [places]
    found = [one for place in places for one in _at(str(place))]
    if not places:
        found = [*_named(), *_in_folder(hub_cache()), *_converted()]
        if not found:
            raise ModelError(
                f"neither {hub_cache()} nor {cache_dir()} holds a model; name a folder, a file or "
                "an id, or run: melens models get smollm2-135m"
            )
    each: dict[str, FoundModel] = {}
    for one in found:
        each.setdefault(_identity(one), one)
    return _with_names_of_their_own(list(each.values()))


def hub_cache() -> Path:
    """The folder of the hub's client."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _identity(found: FoundModel) -> str:
    if found.kind == "named":
        return str(NAMED[found.model].converted.resolve())
    return found.model if found.kind == "hub" else str(Path(found.model).resolve())


def _with_names_of_their_own(models: list[FoundModel]) -> list[FoundModel]:
    """Of several with one name each gets its path."""
    names = [one.name for one in models]
    return [
        one if names.count(one.name) == 1 else FoundModel(one.model, one.kind, one.model)
        for one in models
    ]


def _at(place: str) -> list[FoundModel]:
    wanted = asked(place)
    if wanted.kind != "folder":
        kept = wanted.path if wanted.kind == "gguf" else place
        return [FoundModel(wanted.shown, wanted.kind, str(kept))]
    found = _in_folder(wanted.path)
    if not found:
        raise ModelError(
            f"{place} holds no model: no folder in it has a config.json beside weights, and no "
            "file ends in .gguf."
        )
    return found


def _named() -> list[FoundModel]:
    return [
        FoundModel(name, "named", name)
        for name, model in NAMED.items()
        if on_this_machine(model) == "ready"
    ]


def _converted() -> list[FoundModel]:
    """Converted copies in melens' cache, the named models' left out."""
    own = {model.converted.resolve() for model in NAMED.values()}
    return [
        one for one in _in_folder(cache_dir() / "models") if Path(one.model).resolve() not in own
    ]


def _in_folder(folder: Path) -> list[FoundModel]:
    made = []
    for found in _walk(folder, DEEPEST):
        made.append(found)
        if len(made) > MOST:
            raise ModelError(f"{folder} holds more than {MOST:,} models; name a smaller folder.")
    return made


def _walk(folder: Path, deeper: int) -> Iterator[FoundModel]:
    """Depth first, names in order; a model's own folders hold no other model."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # not there, or not ours to read
        return
    names = {entry.name for entry in entries}
    if (match := REPOSITORY.fullmatch(folder.name)) and "snapshots" in names:
        yield from _snapshot(folder, "/".join(filter(None, match.groups())))
        return
    if "config.json" in names and any(name.endswith(WEIGHTS) for name in names):
        yield FoundModel(folder.resolve().name, "folder", str(folder))
        return
    for entry in entries:
        path = Path(entry.path)
        if entry.name.lower().endswith(".gguf"):
            part = LATER_PART.search(entry.name)
            if path.is_file() and (part is None or int(part[1]) == 1):
                yield FoundModel(entry.name, "gguf", str(path))
        elif deeper and not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
            yield from _walk(path, deeper - 1)


def _snapshot(folder: Path, name: str) -> Iterator[FoundModel]:
    """The commit that ``main`` means, or the newest one; nothing where it has no weights."""
    snapshots = [path for path in (folder / "snapshots").iterdir() if path.is_dir()]
    if not snapshots:
        return
    chosen = max(snapshots, key=lambda path: (path.stat().st_mtime, path.name))
    main = folder / "refs" / "main"
    if main.is_file():
        named = folder / "snapshots" / main.read_text("utf-8", "replace").strip()
        chosen = named if named in snapshots else chosen
    for found in _walk(chosen, 1):
        inside = found.kind == "gguf"
        yield FoundModel(f"{name}/{found.name}" if inside else name, found.kind, found.model)


def require_here(found: Sequence[FoundModel]) -> None:
    """Refuse hub ids that only the network has, where offline was asked for.

    Raises:  ModelNotFoundError: naming the first.
    """
    from melens.models.named import kept_copy
    from melens.network import is_offline

    for one in found:
        if one.kind == "hub" and is_offline() and kept_copy(one.model, None) is None:
            raise ModelNotFoundError(
                f"{one.model} is not in the hub's cache, and offline was asked for."
            )
