"""Folders: filled beside their place and swapped in whole; a lock tells who is at work."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Generator
from pathlib import Path

from melens.errors import OutputError
from melens.store.disk import (
    beside,
    flush_folder,
    lock_of,
    real_path,
    remove_any,
    stem_of,
    sweep,
)

PATIENCE = 30.0
"""Seconds for a lock that nobody else can hold."""
MOST_SWAPS = 9
"""Times that another process may be quicker with the same folder."""
LOCK = re.compile(r"\..+\.[0-9a-f]{16}(\.tmp)?\.lock", re.DOTALL)
"""The lock of a work folder, which has the same name without the end."""


def write_folder(path: Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a new folder, which :func:`replacing` then puts at ``path``.

    A link is followed, as in :func:`write_atomically`.

    Returns: the folder that was written, links resolved.
    Raises:  OutputError: the folder cannot be made or written.
    """
    try:
        target = real_path(path)
        with replacing(target) as part:
            write(part)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}.") from None
    return target


@contextlib.contextmanager
def replacing(target: Path) -> Generator[Path, None, None]:
    """A new folder to fill: put in ``target``'s place when whole, gone when not.

    What was there goes; where moving fails or is interrupted, it comes back. Of two processes that
    write the same folder, the later one's stays. It is readable as any new folder is.

    Raises:  OSError: it cannot be made or moved.
    """
    with workspace(target) as work:
        part = work / "new"
        part.mkdir()
        yield part
        _settle(part)
        _swap(part, target)
    flush_folder(target.parent)


@contextlib.contextmanager
def workspace(target: Path, *, everything: bool = False) -> Generator[Path, None, None]:
    """A private folder beside ``target``, removed at the end.

    What processes left there that were killed over the same target goes first; a lock tells them
    from those that run.

    Args:    everything: of any target, in a folder that melens alone writes in.
    Raises:  OSError: it cannot be made.
    """
    from filelock import FileLock, Timeout

    target.parent.mkdir(parents=True, exist_ok=True)
    work = beside(target, "tmp")
    lock = FileLock(lock_of(work))
    try:  # before the folder is there: one without a lock's owner is left over
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise OSError(errno.ENOLCK, "the file system gives no locks") from None
    try:
        _sweep_folders(target, everything=everything)
        work.mkdir(mode=0o700)  # fails where anything has this name
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def _swap(part: Path, target: Path) -> None:
    olds: list[Path] = []
    try:
        while part.exists():
            olds.append(beside(target, "old"))
            with contextlib.suppress(FileNotFoundError):
                target.rename(olds[-1])
            try:
                part.rename(target)
            except OSError:  # another process may have put its own there in between
                if not target.is_dir() or len(olds) == MOST_SWAPS:
                    raise
    finally:
        for old in filter(os.path.lexists, reversed(olds)):
            remove_any(old) if target.exists() else old.rename(target)


def _settle(folder: Path) -> None:
    """On disk, and readable as any new file is: some libraries write for the owner alone."""
    # The folder is new, so its bits are those that this process gives what it makes.
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode | (path.stat().st_mode & 0o111))
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _sweep_folders(target: Path, *, everything: bool) -> None:
    """Tidy up after commands that were killed; a lock proves it at once."""
    from filelock import FileLock, Timeout

    for path in target.parent.iterdir():
        ours = everything or path.name.startswith(f"{stem_of(target)}.")
        if not ours or not LOCK.fullmatch(path.name) or path.is_symlink():
            continue
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except (Timeout, OSError):  # its process runs, or it is another user's
            continue
        shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        lock.release()
        path.unlink(missing_ok=True)
    sweep(target)
