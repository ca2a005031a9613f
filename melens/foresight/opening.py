"""From what a user typed to a checkpoint whose tensors can be read."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from melens.errors import FetchError, ModelError, ModelNotFoundError, WeightsError
from melens.foresight.blobs import HttpBlob
from melens.foresight.files import (
    Checkpoint,
    indexed,
    read_folder,
    read_gguf,
    safetensors_table,
)
from melens.models.files import INDEX, check_config, check_folder
from melens.models.hub import SINGLE, kept_copy
from melens.models.named import NAMED, fetch
from melens.network import is_offline, pass_on


def open_checkpoint(model: Any, *, revision: str | None = None) -> Checkpoint:
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
        return _folder(fetch(NAMED[name]), name)
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

    Args:    files: ``text(file)``, a small file's text or None, and ``blob(file)``.
    Raises:  ModelNotFoundError: no config.json. WeightsError: no safetensors, or a damaged index.
    """  # fmt: skip
    said = files.text("config.json")
    if said is None:
        raise ModelNotFoundError(f"{name} holds no config.json; give a causal LM's id.")
    config = _json(said, f"{name}: config.json")
    check_config(config, name=name, trust_remote_code=False)
    listed = files.text(INDEX)
    if listed is None:
        blob = files.blob(SINGLE)
        return Checkpoint(
            name, "safetensors", config, safetensors_table(blob), (blob,), SINGLE, revision
        )
    shards = _json(listed, f"{name}: {INDEX}").get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise WeightsError(f"{INDEX} of {name} has no weight_map.")
    blobs = {file: files.blob(file) for file in sorted(set(shards.values()))}
    return Checkpoint(
        name, "safetensors", config, indexed(shards, blobs), tuple(blobs.values()), INDEX, revision
    )


def _json(text: str, name: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ModelError(f"{name} is not a JSON object.")
    return found
