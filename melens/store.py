"""The one way to keep work: files, folders and rows on disk, and hashes of what they are of."""

# pyright: strict

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, TypeVar, cast

from melens.errors import MelensError, OutputError, ResultError

if TYPE_CHECKING:
    from torch import Tensor

Json = dict[str, Any]
"""An object of JSON."""

PAGE, RESULT, TEXT, ROWS = 1_000_000, 256_000_000, 256_000_000, 4_000_000_000
"""Bytes that a policy or record, a result, a text and a file of items may have."""
CHUNK = 1 << 20
"""Bytes that are hashed at once."""
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


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write beside ``path`` and move into place, on disk when this returns.

    A link is followed: the file that it points to is replaced, and the link stays. An existing
    file keeps its permissions; a new one has those that any new file gets.

    Raises:  OutputError: the folder cannot be made or written, or ``path`` is not a
             file to replace.
    """
    raw = data.encode("utf-8") if isinstance(data, str) else data
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        target = _real(path)
        _refuse_irregular(target)
        _sweep(target)
        part = _beside(target, "tmp")
        try:
            _write_new(part, raw)
            if target.exists():
                part.chmod(target.stat().st_mode & 0o7777)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        _flush_folder(target.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}.") from None


def write_folder(path: Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a new folder beside ``path``, then put it there; what was there goes.

    A link is followed, as in :func:`write_atomically`. Where moving fails or is interrupted, the
    folder that was there comes back.

    Returns: the folder that was written, links resolved.
    Raises:  OutputError: the folder cannot be made or written.
    """
    try:
        target = _real(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        part, old = _beside(target, "tmp"), _beside(target, "old")
        part.mkdir()  # fails where anything has this name
        try:
            write(part)
            _open_to_readers(part)
            _swap(part, target, old)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        _flush_folder(target.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}.") from None
    return target


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


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _refuse_irregular(target: Path) -> None:
    """Moving over a device or a pipe would take it away from everybody."""
    if target.exists():
        _require_regular(target.stat().st_mode, target)


def _beside(target: Path, ending: str) -> Path:
    """A name beside ``target`` that nobody can guess; it is short enough for any file system."""
    return target.with_name(f"{_stem(target)}.{secrets.token_hex(8)}.{ending}")


def _stem(target: Path) -> str:
    """Whose a temporary name is: long names are cut, and their hash tells them apart."""
    name = target.name
    return f".{name[:40]}.{digest([os.fsencode(name)], length=8)}"


def _write_new(path: Path, raw: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CLOSE | _BINARY, 0o666)
    with os.fdopen(handle, "wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())


def _swap(part: Path, target: Path, old: Path) -> None:
    try:
        if target.exists():
            target.rename(old)
        part.rename(target)
    finally:
        if not target.exists() and old.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _open_to_readers(folder: Path) -> None:
    """On disk, and readable as any new file is: some libraries write for the owner alone."""
    # The folder is new, so its bits are those that this process gives what it makes.
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """The new name on disk too, where folders can be opened for that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | _CLOSE)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sweep(target: Path) -> None:
    """Tidy up after a command that was killed while it wrote this very file or folder."""
    for path, ending in _leftovers(target):
        with contextlib.suppress(OSError):  # somebody else's, or just gone
            if ending == "old" and not target.exists():
                path.rename(target)  # killed between the two moves
            elif time.time() - _last_change(path) > ABANDONED:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _leftovers(target: Path) -> Iterator[tuple[Path, str]]:
    name = re.compile(re.escape(_stem(target)) + r"\.[0-9a-f]{16}\.(tmp|old)")
    with contextlib.suppress(OSError):
        for path in sorted(target.parent.iterdir()):
            if found := name.fullmatch(path.name):
                yield path, found[1]


def _last_change(path: Path) -> float:
    inside = path.rglob("*") if path.is_dir() and not path.is_symlink() else ()
    return max(part.lstat().st_mtime for part in (path, *inside))


def digest(parts: Iterable[str | bytes | bytearray | memoryview], *, length: int = 16) -> str:
    """The first hex digits of the sha256 of parts, one behind the other; 64 are all."""
    made = hashlib.sha256()
    for part in parts:
        made.update(part.encode() if isinstance(part, str) else part)
    return made.hexdigest()[:length]


def hash_facts(facts: object) -> str:
    """Short hash of everything that numbers depend on, as plain values."""
    return digest([json.dumps(facts, sort_keys=True, default=str)])


def hash_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hex, however long the file is.

    Raises:  OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return digest(iter(lambda: file.read(CHUNK), b""), length=64)


def hash_tensors(labelled: Iterable[tuple[str, Tensor]], *, length: int = 16) -> str:
    """Hash of tensors and of what is said of each: its name, its shape and its dtype, or more."""
    pairs = ((label, tensor_bytes(value)) for label, value in labelled)
    return digest((part for pair in pairs for part in pair), length=length)


def tensor_bytes(value: Tensor) -> memoryview:
    """A tensor's bytes, in the order of its entries, to be hashed."""
    import torch  # not above: whoever writes a file need not have it loaded

    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def lines_of(text: str) -> list[str]:
    r"""Lines of a text, which end at ``\n`` or ``\r\n``; nothing else ends a line.

    ``str.splitlines`` also cuts at U+2028, U+0085 and more, which JSON has inside its strings.
    """
    made = [line.removesuffix("\r") for line in text.split("\n")]
    return made if made[-1] else made[:-1]


def json_object(text: str) -> Json | None:
    """The object that a text of JSON is; None where it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return cast(Json, found) if isinstance(found, dict) else None


def is_text(value: object) -> bool:
    r"""Whether a value is Unicode text; JSON can write half a surrogate pair (``\ud800``) too."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Refusal:
    """What is said of a file that cannot be taken up; ``{path}`` and ``{line}`` are filled in."""

    damaged: str
    foreign: str = ""
    """It is no file of this kind."""
    other: str = ""
    """Its numbers depend on other facts."""


@dataclass(frozen=True)
class Heading:
    """Of what kept work is: its kind, and a key of all facts that its numbers depend on."""

    schema: str
    key: str
    facts: Json | None = None
    """What the key is of, for whoever reads the file."""

    def fits(self, found: Json | None, refusal: Refusal | None, path: Path) -> bool:
        """Whether what is kept with this head may be taken up; None is no head at all.

        Args:    refusal: None = what does not fit is begun anew.
        Raises:  ResultError: it does not fit, and there is a refusal.
        """
        if found is None:
            return _refused(refusal and refusal.damaged, path)
        if found.get("schema") != self.schema:
            return _refused(refusal and refusal.foreign, path)
        if found.get("key") != self.key:
            return _refused(refusal and refusal.other, path)
        return True

    def line(self) -> str:
        """The first line of a file of rows."""
        of = {} if self.facts is None else {"of": self.facts}
        head = {"schema": self.schema, "key": self.key, **of}
        return json.dumps(head, sort_keys=True, default=str) + "\n"


def _refused(said: str | None, path: Path, line: int = 0) -> bool:
    if said is not None:
        raise ResultError(said.format(path=path, line=line))
    return False


Name = TypeVar("Name", bound=Hashable)
Row = TypeVar("Row")


@dataclass(frozen=True)
class RowFormat(Generic[Name, Row]):
    """How rows of one kind are told apart and stand in a file, a line of JSON each."""

    name: Callable[[Row], Name]
    write: Callable[[Row], str]
    read: Callable[[str], Row | None]
    """None for a row that is of something else; raises ValueError where a line is no row."""
    refusal: Refusal | None
    """None = a file of something else, or a damaged one, is begun anew."""


class KeptRows(Generic[Name, Row]):
    """Finished rows by name; on disk, each as soon as it is known, if there is a path.

    An earlier run's are taken up. A torn last line, which a kill leaves, costs its one row.
    """

    def __init__(
        self, path: Path | None, form: RowFormat[Name, Row], heading: Heading | None
    ) -> None:
        """Take up what ``path`` holds, or begin the file.

        Args:    heading: the file's first line; None = it has none, every row says of what it is.
        Raises:  ResultError: the file cannot be read, or is to be refused. OutputError: it cannot
                 be written.
        """
        self.path, self.form, self.heading = path, form, heading
        self.found: dict[Name, Row] = {}
        if path is None or self._take_up(path):
            return
        self.found = {}
        if heading is not None:
            write_atomically(path, heading.line())

    def add(self, rows: Iterable[Row]) -> None:
        """Keep rows that are not there yet; they are on disk when this returns.

        Raises:  OutputError: the file cannot be written.
        """
        new = {name: row for row in rows if (name := self.form.name(row)) not in self.found}
        self.found.update(new)
        if self.path is not None and new:
            _append(self.path, "".join(self.form.write(row) + "\n" for row in new.values()))

    def remove(self) -> None:
        """The result is there: what led to it is not needed any more."""
        if self.path is not None:
            remove_file(self.path)

    def _take_up(self, path: Path) -> bool:
        """False where the file is to be begun."""
        try:
            raw = read_limited(path, ROWS) if path.exists() else b""
        except OSError as error:
            raise ResultError(f"cannot read {path}: {error.strerror or error}.") from None
        whole = raw[: raw.rfind(b"\n") + 1]
        lines = list(enumerate(whole.split(b"\n")[:-1], start=1))
        if self.heading is not None:
            if not raw or not self._is_ours(raw.partition(b"\n")[0], len(lines) > 1, path):
                return False
            lines = lines[1:]
        if not all(self._read(line, number, path) for number, line in lines):
            return False
        if whole != raw:  # a kill in the middle of a line
            write_atomically(path, whole)
        return True

    def _is_ours(self, head: bytes, rows: bool, path: Path) -> bool:
        assert self.heading is not None
        found = json_object(head.decode(errors="replace"))
        if found is not None and found.get("schema") == self.heading.schema and not rows:
            return False  # nothing is lost where it is begun anew
        return self.heading.fits(found, self.form.refusal, path)

    def _read(self, line: bytes, number: int, path: Path) -> bool:
        try:
            row = self.form.read(line.decode())
        except (ValueError, RecursionError):
            refusal = self.form.refusal
            return _refused(refusal and refusal.damaged, path, number)
        if row is not None:
            self.found[self.form.name(row)] = row
        return True


def _append(path: Path, text: str) -> None:
    """At the end of a file, on disk when this returns."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}.") from None
