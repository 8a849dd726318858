"""Lock files, as the hub library uses them: locked with flock, and never deleted.

Another daemon, and any program that downloads, may share the cache.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

LONGEST_WAIT = 2.0
"""Seconds; whoever holds a lock that is waited for does next to nothing meanwhile."""

_POLL_SECONDS = 0.02
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock, after waiting for it.

    Raises:
        TimeoutError: Somebody did not let go of it.
        OSError: There can be no lock here.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as handle:
        _wait(path, handle, fcntl.LOCK_EX)
        yield


def share(path: Path) -> BinaryIO:
    """Holds a lock that others may hold at the same time, until the file is closed.

    Raises:
        TimeoutError: Somebody holds it for himself and does not let go of it.
        OSError: There can be no lock here.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            handle: BinaryIO = stack.enter_context(path.open("ab"))
        except PermissionError:  # another user's; who may read it may hold it
            handle = stack.enter_context(path.open("rb"))
        _wait(path, handle, fcntl.LOCK_SH)
        stack.pop_all()
        return handle


@contextmanager
def try_lock(path: Path, *, otherwise: bool = False) -> Iterator[bool]:
    """Holds a lock if nobody else does; says whether it is held.

    Args:
        path: The lock.
        otherwise: What to say where there can be no lock: it is another user's, the disk is full,
            or the file system has none.

    Raises:
        OSError: Its folder is no folder, or the file system cannot be written to.
    """
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = stack.enter_context(path.open("ab"))
        except OSError as error:
            if not isinstance(error, PermissionError) and error.errno not in _NO_ROOM:
                raise
            held = otherwise
        else:
            held = _try(handle, otherwise=otherwise)
        yield held


def is_locked(path: Path, *, otherwise: bool = True) -> bool:
    """Whether somebody holds a lock, alone or with others. Changes nothing.

    Args:
        path: The lock.
        otherwise: What to say where that cannot be told: it is another user's, or the file system
            has no locks.
    """
    try:
        with path.open("r+b" if os.access(path, os.W_OK) else "rb") as handle:
            return not _try(handle, otherwise=not otherwise)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return otherwise


def _wait(path: Path, handle: BinaryIO, operation: int) -> None:
    deadline = time.monotonic() + LONGEST_WAIT
    while True:
        try:
            fcntl.flock(handle, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                problem = "another process does not let go of it"
                raise TimeoutError(errno.ETIMEDOUT, problem, str(path)) from None
            time.sleep(_POLL_SECONDS)
        else:
            return


def _try(handle: BinaryIO, *, otherwise: bool) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks
        return otherwise
    return True
