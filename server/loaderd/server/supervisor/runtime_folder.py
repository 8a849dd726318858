"""Folders that belong to one daemon, behind a lock; the workers' socket lives in one."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

logger = logging.getLogger(__name__)

_PREFIX = "loaderd-"
_LOCK = "lock"
_LONGEST = 60  # of the folder's path: a unix socket's path may have 107 bytes


class OwnedFolder:
    """A fresh folder that only this user can enter, removed at the end.

    It holds a lock while it is in use. Folders without a holder are what killed daemons left, and
    are removed when the next one starts.

    Args:
        base: Where it is made.
    """

    def __init__(self, base: Path) -> None:
        self._base = base

    def __enter__(self) -> Self:
        sweep(self._base)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._base))
        self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


class RuntimeFolder(OwnedFolder):
    """The one with the workers' socket."""

    def __init__(self) -> None:
        base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
        if not base.is_dir() or len(os.fsencode(base)) > _LONGEST:
            base = Path("/tmp")  # noqa: S108 - mkdtemp makes the folder, with mode 0700
        super().__init__(base)


def sweep(base: Path) -> None:
    """Removes what killed daemons left in a folder."""
    for folder in base.glob(_PREFIX + "*"):
        lock = folder / _LOCK
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            handle = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # another user's, gone meanwhile, or about to be locked
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            logger.info("removed the folder of a daemon that was killed: %s", folder.name)
        except BlockingIOError:
            pass  # its daemon lives
        finally:
            os.close(handle)
