"""From what a user typed to a checkpoint whose tensors can be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melens.errors import FetchError, ModelError, ModelNotFoundError, WeightsError
from melens.models.checkpoint import Blob, Checkpoint, read_blobs, read_gguf
from melens.models.files import ADAPTER, check_config, check_fit, check_folder, require_no_adapter
from melens.models.hub import OFFLINE, asking_the_hub, hub_commit
from melens.models.multimodal import language_config
from melens.models.named import NAMED, fetch, kept_copy
from melens.models.resolve import asked
from melens.models.weight_files import HEADER_LIMIT, INDEX, SINGLE, main_file, weight_map
from melens.network import is_offline, pass_on

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


def open_checkpoint(model: str | Path, *, revision: str | None = None) -> Checkpoint:
    """The tensors of a named model, a folder, a ``.gguf`` file or a hub id.

    The network is used for a hub id (which commit it is, then only the tensors that are asked for,
    where the hub's cache here does not hold that commit), and for a named model that was not
    fetched yet.

    Raises:  ModelNotFoundError, ModelError, WeightsError, FetchError: as ``melens.load`` does.
    """
    if not isinstance(model, (str, Path)):
        raise ModelError(
            f"scan() reads files, and got a {type(model).__name__}; give a path or a name."
        )
    wanted = asked(model, revision=revision)
    if wanted.kind == "hub":
        return _on_the_hub(wanted.name, revision)
    path = fetch(NAMED[wanted.name]) if wanted.kind == "named" else wanted.path
    if path.is_dir():
        return _named(check_folder(path, trust_remote_code=False), wanted.shown)
    found = read_gguf(path)  # read as it is: no converted copy is needed
    return found if wanted.kind == "gguf" else _named(found, wanted.name)


def _named(found: Checkpoint, name: str) -> Checkpoint:
    found.name = name
    return found


def _on_the_hub(name: str, revision: str | None) -> Checkpoint:
    """The hub's commit, as ``load`` takes it: from its cache here if it is whole, else by ranges.

    Where the hub is out of reach, or offline was asked for, the cache alone decides.

    Raises:  FetchError: out of reach and not in the cache. WeightsError: no safetensors.
    """
    pass_on()
    from fsspec.implementations.dirfs import DirFileSystem
    from huggingface_hub import HfFileSystem

    try:
        commit = None if is_offline() else hub_commit(name, revision)
        failure = FetchError(f"{name} is no named model and no folder here, and {OFFLINE}.")
    except FetchError as error:
        commit, failure = None, error
    folder = kept_copy(name, commit or revision)
    if folder is not None:
        found = check_folder(folder, trust_remote_code=False)
        found.revision = commit or revision or folder.name
        return _named(found, name)
    if commit is None:
        raise failure
    with asking_the_hub(name):
        return by_range(name, commit, DirFileSystem(f"{name}@{commit}", HfFileSystem()))


def by_range(name: str, revision: str | None, files: AbstractFileSystem) -> Checkpoint:
    """A checkpoint whose tensors are read where they lie, on a server.

    Args:    files: an fsspec file system with the repository as its root.
    Raises:  ModelNotFoundError: no config.json. WeightsError: no safetensors, a damaged index, or
             others than the config's model uses.
    """
    if not files.isfile("config.json"):
        raise ModelNotFoundError(f"{name} holds no config.json; give a causal LM's id.")
    config = language_config(_json(files, "config.json"))
    if not isinstance(config, dict):
        raise ModelError(f"{name}: config.json is not a JSON object.")
    check_config(config, name=name, trust_remote_code=False)
    require_no_adapter(files.isfile(ADAPTER), name=name)
    main = main_file(files.isfile, config)
    if main is None:
        raise WeightsError(f"{name} holds no safetensors weights ({SINGLE} or {INDEX}).")
    placed = weight_map(_json(files, main), main) if main.endswith(".json") else {}
    blobs = {file: _blob(files, file) for file in sorted(set(placed.values())) or [main]}
    found = read_blobs(blobs, config, name=name, placed=placed, main=main, revision=revision)
    check_fit(config, found.shapes, name=name)
    return found


def _blob(files: Any, file: str) -> Blob:
    return Blob(file, files.size(file), lambda: files.open(file, "rb", cache_type="none"))


def _json(files: AbstractFileSystem, file: str) -> object:
    """What a small file says; None where it is not JSON."""
    try:
        return json.loads(files.cat_file(file, 0, HEADER_LIMIT))
    except (ValueError, RecursionError):
        return None
