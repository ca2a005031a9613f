"""What did the user name? One answer for every command; nothing is read or fetched for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from melens.errors import ModelError, ModelNotFoundError
from melens.models.named import NAMED
from melens.registry import closest


@dataclass(frozen=True)
class Asked:
    """A model as the user named it."""

    name: str
    kind: Literal["named", "folder", "gguf", "hub"]
    path: Path = Path()
    """Of a folder or file."""

    @property
    def is_local(self) -> bool:
        """Whether no hub is asked for it."""
        return self.kind != "hub"

    @property
    def shown(self) -> str:
        """What results call it."""
        return self.path.resolve().name if self.kind in ("folder", "gguf") else self.name


def asked(model: str | Path, *, revision: str | None = None) -> Asked:
    """A named model, a folder, a ``.gguf`` file, or else a hub id.

    Raises:  ModelNotFoundError: no name, a path that leads nowhere, or a misspelt named model.
             ModelError: another file, or a revision of what is no hub id.
    """
    found = _kind(str(model))
    if found.is_local and revision is not None:
        raise ModelError(f"revision belongs to a hub id; {model} is a local model.")
    return found


def _kind(name: str) -> Asked:
    if name in NAMED:
        return Asked(name, "named")
    if not name.strip():
        raise ModelNotFoundError("the model's name is empty; see: melens models")
    path = Path(name).expanduser()
    if path.is_dir():
        return Asked(name, "folder", path)
    if path.exists():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{name} is a file, but no .gguf; give the model's folder instead.")
        return Asked(name, "gguf", path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf"):
        raise ModelNotFoundError(f"there is no file or folder {name}.")
    if "/" not in name and closest(name, NAMED):
        raise ModelNotFoundError(NAMED.unknown(name))
    return Asked(name, "hub")
