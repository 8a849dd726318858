"""Hashes of contents, by which the cache names its blobs.

A blob's name is the sha256 of its content (64 hex digits) when the hub keeps it in LFS, and else
git's sha1 of it (40 hex digits).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from loaderd.server.store.reading import open_unnoticed

if TYPE_CHECKING:
    from hashlib import _Hash

_CHUNK_BYTES = 4 << 20
_SHA256_LENGTH = 64
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def is_digest(text: str) -> bool:
    """Whether the text can name a blob."""
    return _DIGEST.fullmatch(text) is not None


def digest_of_bytes(data: bytes, like: str) -> str:
    """The digest of the kind of `like`."""
    digest = new_digest(like, len(data))
    digest.update(data)
    return digest.hexdigest()


def digest_of_file(path: Path, like: str, on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """The digest of the kind of `like`; tells `on_bytes` of every piece that was read."""
    digest = new_digest(like, path.stat().st_size)
    with open_unnoticed(path) as content:
        while chunk := content.read(_CHUNK_BYTES):
            digest.update(chunk)
            on_bytes(len(chunk))
    return digest.hexdigest()


def stamp_of(path: Path) -> str:
    """Changes whenever the file's content may have, and seldom else.

    It is made of the inode, the size, and the time of the last change, which nobody can set.

    Raises:
        FileNotFoundError: There is no such file.
    """
    stat = path.stat()
    return f"{stat.st_ino}-{stat.st_size}-{stat.st_ctime_ns}"


def new_digest(like: str, size: int) -> _Hash:
    """The digest of the kind of `like`, of a content of `size` bytes that is yet to come."""
    if len(like) == _SHA256_LENGTH:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
