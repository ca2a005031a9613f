"""Where melens keeps weights, and how it fetches a package by its ordinary name."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.util
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from melens.errors import FetchError, WeightsError
from melens.progress import HUSHED

CHUNK = 1 << 20
WORK_LOCK = re.compile(r"\..+\.[0-9a-f]{16}\.lock")
"""A work folder's lock; the folder has the same name without the end."""
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


def _stderr() -> Any:
    """Where an installer may show its progress: stderr, or nowhere where that is not a file."""
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

    Two processes may build the same; one of the results stays. It is readable by whoever the
    user's umask lets read it.

    Raises:  FetchError: the cache cannot be written.
    """
    with workspace(target.parent, target.name) as work:
        part = work / "new"
        part.mkdir()
        yield part
        _settle(part)
        with contextlib.suppress(FileNotFoundError):
            target.replace(work / "old")
        try:
            part.replace(target)
        except OSError:
            if not target.is_dir():  # else another process has just put the same in its place
                raise


@contextlib.contextmanager
def workspace(parent: Path, name: str) -> Iterator[Path]:
    """A private folder beside what is to be made, removed at the end.

    What killed processes left there is removed first; a lock tells them from those that run.

    Raises:  FetchError: the cache cannot be written.
    """
    from filelock import FileLock

    work = parent / f".{name}.{secrets.token_hex(8)}"
    lock = FileLock(f"{work}.lock")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()  # before the folder is there: one without a lock's owner is left over
        remove_leftovers(parent, name)
        work.mkdir(mode=0o700)
    except OSError as error:
        lock.release()
        raise FetchError(
            f"cannot write to the cache {parent}: {error.strerror}; set MELENS_CACHE."
        ) from None
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def remove_leftovers(parent: Path, name: str) -> None:
    """Remove work folders whose process is gone; and old ones of ``name`` that have no lock, as
    older versions made them.
    """  # noqa: D205
    from filelock import FileLock, Timeout

    for path in parent.iterdir():
        if not WORK_LOCK.fullmatch(path.name):
            continue
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except (Timeout, OSError):  # its process runs, or it is another user's
            continue
        shutil.rmtree(path.with_name(path.name.removesuffix(".lock")), ignore_errors=True)
        lock.release()
        path.unlink(missing_ok=True)
    for path in parent.glob(f".{glob.escape(name)}.*"):
        with contextlib.suppress(OSError):
            old = time.time() - path.stat().st_mtime > OLD
            if old and not path.with_name(path.name + ".lock").exists() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Every file on the disk, with the rights that the user gives new files."""
    rights = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(rights | (path.stat().st_mode & 0o111))
            with path.open("rb") as file:
                os.fsync(file.fileno())
