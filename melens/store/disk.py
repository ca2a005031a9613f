"""Files: written whole or not at all, read with a limit, and their lines."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from melens.errors import MelensError, OutputError
from melens.protocols import Json, JsonObject
from melens.store.identity import digest

PAGE, RESULT, TEXT, ROWS = 1_000_000, 256_000_000, 256_000_000, 4_000_000_000
"""Bytes that a policy or record, a result, a text and a file of items may have."""
CHUNK = 1 << 20
"""Bytes that are hashed at once."""
TRIAL = 4096
"""Bytes that are written to see whether a disk has room."""
ABANDONED = 3600.0
"""Seconds without a change after which a temporary file is a killed command's."""
_NO_WAIT, _CLOSE, _BINARY = (
    getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY")
)
"""Not every system has them all."""
_NOT_REGULAR = {
    stat.S_ISDIR: "it is a folder",
    stat.S_ISFIFO: "it is a pipe (a FIFO)",
    stat.S_ISSOCK: "it is a socket",
    stat.S_ISCHR: "it is a device",
    stat.S_ISBLK: "it is a device",
}


def write_atomically(path: Path, data: str | bytes, *, flush: bool = True) -> None:
    """Write beside ``path`` and move into place, on disk when this returns.

    A link is followed: the file that it points to is replaced, and the link stays. An existing
    file keeps its permissions; a new one has those that any new file gets.

    Args:    flush: False = do not wait for the disk, where the file can be made again.
    Raises:  OutputError: the folder cannot be made or written, or ``path`` is not a
             file to replace.
    """
    raw = data.encode("utf-8") if isinstance(data, str) else data
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        target = real_path(path)
        _refuse_irregular(target)
        sweep(target)
        part = beside(target, "tmp")
        try:
            _write_new(part, raw, flush=flush)
            if target.exists():
                part.chmod(target.stat().st_mode & 0o7777)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        if flush:
            flush_folder(target.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}.") from None


def try_writing(folder: Path, way_out: str) -> None:
    """Write a file into a folder, or where it would be made, and remove it: a full disk and a
    read-only one give permission all the same.

    Args:    way_out: what to do where it cannot be written, as "choose another --out".
    Raises:  OutputError: it cannot.
    """  # noqa: D205
    above = folder
    try:
        above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=above, buffering=0) as file:
            file.write(bytes(TRIAL))
    except OSError as error:
        raise OutputError(f"cannot write into {above}: {error.strerror}; {way_out}.") from None


def remove_file(path: Path) -> None:
    """Remove a file, if it is there.

    Raises:  OutputError: it cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot remove {path}: {error.strerror or error}.") from None


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, if it is one: a pipe would wait for ever, a device never ends.

    Those of /proc call themselves regular files of no bytes, whatever comes out of them; some
    never end, or wait. A file of no bytes that has some is refused.

    Raises:  OSError: whose ``strerror`` says what it is instead.
    """
    handle = os.open(path, os.O_RDONLY | _NO_WAIT | _CLOSE | _BINARY)
    try:
        found = os.fstat(handle)
        _require_regular(found.st_mode, path)
        if not found.st_size:
            _require_nothing(handle, path)
    except OSError:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


def read_limited(path: Path, limit: int) -> bytes:
    """A regular file's bytes, its size looked at first; ``limit`` bytes at most.

    Raises:  OSError: it cannot be read, is no regular file, or is longer.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        raw = b"" if size > limit else file.read(size + 1)
        if len(raw) > size:  # it grows
            raw += file.read(limit + 1 - len(raw))
    if max(size, len(raw)) > limit:
        said = f"it has {max(size, len(raw)):,} bytes, and at most {limit:,} are read"
        raise OSError(errno.EFBIG, said, str(path))
    return raw


def hash_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hex, however long the file is.

    Raises:  OSError: it cannot be read, or is no regular file.
    """
    with open_regular(path) as file:
        return digest(iter(lambda: file.read(CHUNK), b""), length=64)


def read_text(path: Path, limit: int, *, error: type[MelensError], what: str = "") -> str:
    """A small file of UTF-8 text.

    Args:    what: what the file is to the user, such as "the policy", for the message.
    Raises:  ``error``: it cannot be read, is no regular file, is too long, or no UTF-8.
    """
    name = f"{what} {path}".strip()
    try:
        return read_limited(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as bad:
        raise error(f"cannot read {name}: byte {bad.start} is not UTF-8 text.") from None
    except (OSError, ValueError) as bad:  # ValueError: a NUL inside the name
        raise error(f"cannot read {name}: {getattr(bad, 'strerror', None) or bad}.") from None


def read_stdin(limit: int, *, error: type[MelensError]) -> str:
    """All of standard input, UTF-8.

    Raises:  ``error``: more than ``limit`` bytes, or no UTF-8.
    """
    if sys.stdin is None:
        raise error("standard input is closed; give a file in its place.")
    raw = sys.stdin.buffer.read(limit + 1)
    if len(raw) > limit:
        raise error(f"standard input has more than {limit:,} bytes, and at most that are read.")
    return decoded(raw, "standard input", error=error)


def decoded(raw: bytes, name: str, *, error: type[MelensError]) -> str:
    """Bytes as text.

    Raises:  ``error``: no UTF-8.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as bad:
        raise error(
            f"{name} is not UTF-8 (byte {bad.start}); convert it, e.g. with iconv."
        ) from None


def _require_regular(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        what = next((text for test, text in _NOT_REGULAR.items() if test(mode)), "it is not a file")
        raise OSError(errno.EINVAL, f"{what}, not a regular file", str(path))


def _require_nothing(handle: int, path: Path) -> None:
    try:
        has = bool(os.read(handle, 1))
    except BlockingIOError:  # nothing to read yet
        has = True
    if has:
        said = "it tells no size, as files of /proc do; copy it to a file and give that"
        raise OSError(errno.EINVAL, said, str(path))


def real_path(path: Path) -> Path:
    """Where a path leads, links followed."""
    return Path(os.path.realpath(path))


def _refuse_irregular(target: Path) -> None:
    """Moving over a device or a pipe would take it away from everybody."""
    if target.exists():
        _require_regular(target.stat().st_mode, target)


def beside(target: Path, ending: str) -> Path:
    """A name beside ``target`` that nobody can guess; it is short enough for any file system."""
    return target.with_name(f"{stem_of(target)}.{secrets.token_hex(8)}.{ending}")


def stem_of(target: Path) -> str:
    """Whose a temporary name is: long names are cut, and their hash tells them apart."""
    name = target.name
    return f".{name[:40]}.{digest([os.fsencode(name)], length=8)}"


def _write_new(path: Path, raw: bytes, *, flush: bool) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CLOSE | _BINARY, 0o666)
    with os.fdopen(handle, "wb") as file:
        file.write(raw)
        file.flush()
        if flush:
            os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """The new name on disk too, where folders can be opened for that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | _CLOSE)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep(target: Path) -> None:
    """Tidy up after a command that was killed while it wrote this very file or folder."""
    for path, ending in _leftovers(target):
        with contextlib.suppress(OSError):  # somebody else's, or just gone
            if ending == "old" and not target.exists():
                path.rename(target)  # killed between the two moves
            elif time.time() - _last_change(path) > ABANDONED and not lock_of(path).exists():
                remove_any(path)


def _leftovers(target: Path) -> Iterator[tuple[Path, str]]:
    name = re.compile(re.escape(stem_of(target)) + r"\.[0-9a-f]{16}\.(tmp|old)")
    with contextlib.suppress(OSError):
        for path in sorted(target.parent.iterdir()):
            if found := name.fullmatch(path.name):
                yield path, found[1]


def lock_of(path: Path) -> Path:
    """The lock that whoever works in a temporary folder holds."""
    return path.with_name(f"{path.name}.lock")


def remove_any(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _last_change(path: Path) -> float:
    inside = path.rglob("*") if path.is_dir() and not path.is_symlink() else ()
    return max(part.lstat().st_mtime for part in (path, *inside))


def lines_of(text: str) -> list[str]:
    r"""Lines of a text, which end at ``\n`` or ``\r\n``; nothing else ends a line.

    ``str.splitlines`` also cuts at U+2028, U+0085 and more, which JSON has inside its strings.
    """
    made = [line.removesuffix("\r") for line in text.split("\n")]
    return made if made[-1] else made[:-1]


def json_object(text: str) -> JsonObject | None:
    """The object that a text of JSON is; None where it is none."""
    try:
        found: Json = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def is_text(value: object) -> bool:
    r"""Whether a value is Unicode text; JSON can write half a surrogate pair (``\ud800``) too."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
