"""A blob on its way into the cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from loaderd.server.store.digests import new_digest

_CHUNK_BYTES = 1 << 20


class PartialBlob:
    """What came of a blob so far, in a file beside its place, and the hash of that.

    A context manager; on leaving it the file stays for the next download unless it is empty.
    Whoever writes holds the blob's lock. Where the file system's locks do not work, two may
    write at once; who sees that another wrote reads in the end what is there.

    Args:
        path: The file.
        size: Bytes of the whole blob.
        digest: What they hash to.
    """

    def __init__(self, path: Path, size: int, digest: str) -> None:
        self.received = 0
        self._path = path
        self._size = size
        self._digest = digest
        self._hash = new_digest(digest, size)
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._left_as = self._state()
        self._disturbed = False

    def __enter__(self) -> PartialBlob:
        return self

    def __exit__(self, *_: object) -> None:
        empty = not os.fstat(self._handle).st_size
        os.close(self._handle)
        if empty:
            self.delete()

    def take_over(self, on_bytes: Callable[[int], None]) -> None:
        """Goes on from what an earlier download left; hashes it.

        Args:
            on_bytes: Told of every piece that was read.
        """
        if os.fstat(self._handle).st_size > self._size:
            self.start_over()
        while data := os.pread(self._handle, _CHUNK_BYTES, self.received):
            self._add(data)
            on_bytes(len(data))

    def write(self, data: bytes) -> None:
        """Adds what came.

        Raises:
            OSError: The disk is full, or broken.
        """
        self._look()
        written = 0
        while written < len(data):
            rest = memoryview(data)[written:]
            written += os.pwrite(self._handle, rest, self.received + written)
        self._left_as = self._state()
        self._add(data)

    def start_over(self) -> None:
        """Forgets what came."""
        os.ftruncate(self._handle, 0)
        self._left_as, self._disturbed = self._state(), False
        self._hash = new_digest(self._digest, self._size)
        self.received = 0

    @property
    def found(self) -> str:
        """What the bytes that came hash to."""
        self._look()
        return self._read() if self._disturbed else self._hash.hexdigest()

    def publish(self, blob: Path) -> None:
        """Gives it its name, whole and right."""
        self._path.rename(blob)

    def delete(self) -> None:
        """Frees the disk; what is written from now on is lost."""
        self._path.unlink(missing_ok=True)

    def _add(self, data: bytes) -> None:
        self._hash.update(data)
        self.received += len(data)

    def _look(self) -> None:
        """Notices when somebody else wrote since this one did."""
        self._disturbed |= self._state() != self._left_as

    def _state(self) -> tuple[int, int]:
        stat = os.fstat(self._handle)
        return stat.st_size, stat.st_mtime_ns

    def _read(self) -> str:
        """What the file hashes to."""
        found, start = new_digest(self._digest, self._size), 0
        while data := os.pread(self._handle, _CHUNK_BYTES, start):
            found.update(data)
            start += len(data)
        return found.hexdigest()
