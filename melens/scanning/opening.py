"""From what a user typed to a checkpoint whose tensors can be read."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from melens.errors import FetchError, ModelError, ModelNotFoundError, WeightsError
from melens.models.files import ADAPTER, check_config, check_fit, check_folder, require_no_adapter
from melens.models.named import NAMED, fetch, kept_copy
from melens.models.weight_files import INDEX, SINGLE, main_file, weight_map
from melens.network import is_offline, pass_on
from melens.protocols import JsonObject
from melens.scanning.files import Checkpoint, HttpBlob, from_blobs, read_folder, read_gguf


def open_checkpoint(model: str | Path, *, revision: str | None = None) -> Checkpoint:
    """The tensors of a named model, a folder, a ``.gguf`` file or a hub id.

    The network is used for a hub id that is not in the hub's cache here, and for a named model
    that was not fetched yet; of a hub id only the tensors that are asked for travel.

    Raises:  ModelNotFoundError, ModelError, WeightsError, FetchError: as ``melens.load`` does.
    """
    if not isinstance(model, (str, Path)):
        raise ModelError(
            f"scan() reads files, and got a {type(model).__name__}; give a path or a name."
        )
    name = str(model)
    path = Path(name).expanduser()
    if not name.strip():
        raise ModelNotFoundError("the model's name is empty; see: melens models")
    if name in NAMED or path.exists():
        if revision is not None:
            raise ModelError(f"revision belongs to a hub id; {name} is a local model.")
        return _local(name, path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf"):
        raise ModelNotFoundError(f"there is no file or folder {name}.")
    if "/" not in name and difflib.get_close_matches(name, NAMED, n=1):
        raise ModelNotFoundError(NAMED.unknown(name))
    return _on_the_hub(name, revision)


def _local(name: str, path: Path) -> Checkpoint:
    if name in NAMED:
        found = fetch(NAMED[name])
        if found.is_dir():
            return _folder(found, name)
        made = read_gguf(found)  # no converted copy is to be kept
        made.name = name
        return made
    if path.is_dir():
        return _folder(path, path.resolve().name)
    if path.suffix.lower() != ".gguf":
        raise ModelError(f"{name} is a file, but no .gguf; give the model's folder instead.")
    return read_gguf(path)


def _folder(folder: Path, name: str) -> Checkpoint:
    check_folder(folder, trust_remote_code=False)
    return read_folder(folder, name=name)


def _on_the_hub(name: str, revision: str | None) -> Checkpoint:
    """Whole in the hub's cache, or else read by ranges.

    Raises:  FetchError: out of reach, or offline was asked for. WeightsError: no safetensors.
    """
    pass_on()
    from huggingface_hub import model_info
    from huggingface_hub.errors import HfHubHTTPError

    folder = kept_copy(name, revision)
    if folder is not None:
        found = _folder(folder, name)
        found.revision = revision or folder.name
        return found
    if is_offline():
        raise FetchError(f"{name} is no named model and no folder here, and offline was asked for.")
    try:
        commit = model_info(name, revision=revision).sha  # one commit, whatever is pushed meanwhile
        return by_range(name, commit, _HubFiles(name, commit))
    except (HfHubHTTPError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise FetchError(
            f"{name} is no named model and no folder here, and the hub could not be read: {said}"
        ) from None


class _HubFiles:
    """The hub's small files, fetched whole, and its large ones, by range."""

    def __init__(self, name: str, revision: str | None) -> None:
        self.name, self.revision = name, revision

    def has(self, file: str) -> bool:
        """Whether the repository has a file of that name."""
        from huggingface_hub import file_exists

        return file_exists(self.name, file, revision=self.revision)

    def text(self, file: str) -> str | None:
        """A small file's text; None where the repository has none of that name."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return Path(hf_hub_download(self.name, file, revision=self.revision)).read_text("utf-8")
        except EntryNotFoundError:
            return None

    def blob(self, file: str) -> HttpBlob:
        """A weight file."""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.name, file, revision=self.revision)
        return HttpBlob(url, get_session(), build_hf_headers(), file)


def by_range(name: str, revision: str | None, files: Any) -> Checkpoint:
    """A checkpoint whose tensors are read where they lie, on a server.

    Args:    files: ``has(file)``, ``text(file)``, a small file's text or None, and
             ``blob(file)``.
    Raises:  ModelNotFoundError: no config.json. WeightsError: no safetensors, a damaged index, or
             others than the config's model uses.
    """
    said = files.text("config.json")
    if said is None:
        raise ModelNotFoundError(f"{name} holds no config.json; give a causal LM's id.")
    config = _object(_json(said), f"{name}: config.json")
    check_config(config, name=name, trust_remote_code=False)
    require_no_adapter(files.has(ADAPTER), name=name)
    main = main_file(files.has, config)
    if main is None:
        raise WeightsError(f"{name} holds no safetensors weights ({SINGLE} or {INDEX}).")
    placed = weight_map(_json(files.text(main) or ""), main) if main.endswith(".json") else {}
    blobs = {file: files.blob(file) for file in sorted(set(placed.values())) or [main]}
    found = from_blobs((name, config), blobs, placed=placed, main=main, revision=revision)
    check_fit(config, {key: stored.shape for key, stored in found.tensors.items()}, name=name)
    return found


def _json(text: str) -> Any:
    """What a text says; None where it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _object(found: object, name: str) -> JsonObject:
    if not isinstance(found, dict):
        raise ModelError(f"{name} is not a JSON object.")
    return found
