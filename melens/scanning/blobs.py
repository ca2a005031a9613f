"""Bytes of a weight file by place: from disk, or by ranged requests from a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from melens.errors import FetchError, WeightsError

PARTIAL = 206
"""HTTP status of a ranged answer."""


@runtime_checkable
class Blob(Protocol):
    """A file that can be read from any place."""

    name: str
    size: int
    stamp: int
    """When it was written, in nanoseconds; 0 where that is not known."""
    piece: int
    """Bytes that are best read at once."""

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes from ``start`` on, or raise."""
        ...

    def close(self) -> None:
        """Give back what is held; a later read takes it anew."""
        ...


class FileBlob:
    """A local file, read without mapping it: pages that were read are not this process's."""

    piece = 1 << 18
    """Small enough to stay in the processor's cache until it is used."""

    def __init__(self, path: Path) -> None:
        """Opens nothing yet.

        Raises:  WeightsError: there is no such file.
        """
        self._file: Any = None
        if not path.is_file():
            raise WeightsError(f"{path.name} is missing from {path.parent}; fetch it again.")
        self.path, self.name = path, path.name
        status = path.stat()
        self.size, self.stamp = status.st_size, status.st_mtime_ns

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Raises WeightsError where the file ends early or cannot be read."""
        try:
            if self._file is None:
                self._file = self.path.open("rb", buffering=0)
            self._file.seek(start)
            done = 0
            while done < len(buffer) and (got := self._file.readinto(buffer[done:])):
                done += got
        except OSError as error:
            raise WeightsError(f"cannot read {self.path}: {error.strerror}.") from None
        if done < len(buffer):
            raise WeightsError(f"{self.name} ends at byte {start + done}; fetch it again.")

    def close(self) -> None:
        """Give the file handle back; a later read opens it anew."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __del__(self) -> None:
        """A file that was refused halfway is given back too."""
        self.close()


class HttpBlob:
    """A file behind a URL whose server answers ranged requests, as the hub's does.

    Tested against a client that answers as a server would; never against the hub itself.
    """

    stamp = 0
    piece = 1 << 23
    """Every piece is a request, and a request costs as long as many bytes do."""

    def __init__(self, url: str, client: Any, headers: dict[str, str], name: str) -> None:
        """Asks for one byte, to learn the file's size.

        Args:    client: with ``get(url, headers=, follow_redirects=)``, as httpx' Client has.
        Raises:  FetchError: out of reach, or a server that does not answer by range.
        """  # fmt: skip
        self.name = name
        self._url, self._client, self._headers = url, client, headers
        said = self._get(0, 1).headers.get("content-range", "")
        total = said.rpartition("/")[2]
        if not total.isdigit():
            raise FetchError(f"the server of {name} does not say how large it is ({said!r}).")
        self.size = int(total)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Raises FetchError where the server gives something else than what was asked for."""
        got = self._get(start, len(buffer)).content
        if len(got) != len(buffer):
            raise FetchError(
                f"{self.name}: {len(got)} bytes came for {len(buffer)} asked at {start}; try again."
            )
        buffer[:] = got

    def close(self) -> None:
        """The client is not ours to close."""

    def _get(self, start: int, length: int) -> Any:
        headers = {**self._headers, "Range": f"bytes={start}-{start + length - 1}"}
        try:
            answer = self._client.get(self._url, headers=headers, follow_redirects=True)
        except Exception as error:  # each HTTP library has errors of its own
            raise FetchError(
                f"cannot read {self.name}: {type(error).__name__} {str(error)[:150]}"
            ) from None
        if answer.status_code != PARTIAL:
            raise FetchError(
                f"the server answered {answer.status_code} "
                f"for a part of {self.name}, not {PARTIAL}."
            )
        return answer
