"""Where melens keeps weights, and how it fetches a package by its ordinary name."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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

    Raises:  FetchError: neither pip nor uv is here, or the package index cannot be reached.
    """
    target = cache_dir() / "packages" / package
    part = target.with_name(f"{package}.part-{os.getpid()}")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(
            [*_installer(), "install", "--no-deps", "--target", str(part),
             f"{package}=={version}"],
            stdout=sys.stderr.fileno() if hasattr(sys.stderr, "fileno") else None, check=False,
        )  # fmt: skip
        if done.returncode:
            raise FetchError(
                f"could not fetch {package}=={version} from the package index; check the network, "
                f"or install it yourself with: pip install --no-deps {package}=={version}"
            )
        shutil.rmtree(target, ignore_errors=True)
        part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _installer() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if uv := shutil.which("uv"):
        return [uv, "pip"]
    raise FetchError("fetching weights needs pip or uv, and neither is here; install one.")


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
            "remove it (melens models rm) and fetch it again."
        )


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """A folder to build in, moved to ``target`` when complete and removed when not."""
    part = target.with_name(f"{target.name}.part-{os.getpid()}")
    try:
        part.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FetchError(
            f"cannot write to the cache {target.parent}: {error.strerror}; set MELENS_CACHE."
        ) from None
    try:
        yield part
        if not target.exists():
            part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
