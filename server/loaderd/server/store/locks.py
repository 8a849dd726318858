"""Lock files, as the hub library uses them: locked with flock, and never deleted.

Another daemon, and any program that downloads, may share the cache.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock, after waiting for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Holds a lock if nobody else does; says whether it is held.

    It is not when it is another user's, or when the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = path.open("ab")
    except PermissionError:
        yield False
        return
    with handle:
        yield _lock_now(handle)


def is_locked(path: Path) -> bool:
    """Whether somebody holds a lock, as far as it can be told. Changes nothing."""
    try:
        with path.open("rb") as handle:
            return not _lock_now(handle)
    except FileNotFoundError:
        return False
    except PermissionError:  # another user's
        return True


def _lock_now(handle: BinaryIO) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or the file system has no locks
        return False
    return True
