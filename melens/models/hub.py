"""What the hub's cache on this machine holds of a model; nothing is asked of the hub."""

from __future__ import annotations

from pathlib import Path

from melens.errors import ModelError, ModelNotFoundError
from melens.models.named import NAMED
from melens.models.weight_files import read_json, weight_files


def kept_copy(name: str, revision: str | None) -> Path | None:
    """The folder of a hub id, if all its weights are there: the cache may hold a config alone.

    Raises:  ModelNotFoundError: a name that the hub cannot have.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        raise ModelNotFoundError(f"{NAMED.unknown(name)} The hub knows none either.") from None
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    try:
        read = read_json(folder / "config.json")
        chosen = weight_files(folder, read) if isinstance(read, dict) else None
    except ModelError:  # nothing but the config, or a config or index that is damaged
        return None
    if chosen is None:
        return None
    return folder if all(file.is_file() for file in chosen.files) else None
