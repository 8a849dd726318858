"""Reading files in order to check them, which is no use of the model."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_unnoticed(path: Path) -> BinaryIO:
    """Opens a regular file for reading; its time of last access stays where it may.

    Listing the cache would otherwise make every model look recently used.

    Raises:
        OSError: It cannot be read, or is something else than a file, such as a pipe.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # nobody need write to a pipe
    try:
        handle = os.open(path, flags | os.O_NOATIME)
    except PermissionError:  # only its owner may
        handle = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return os.fdopen(handle, "rb")


def read_small(path: Path, longest: int) -> bytes:
    """The content of a file that others may have put there.

    Args:
        path: The file.
        longest: How many bytes it may have.

    Raises:
        OSError: It cannot be read, is no regular file, or is longer.
    """
    with open_unnoticed(path) as content:
        data = content.read(longest + 1)
    if len(data) > longest:
        raise OSError(errno.EFBIG, f"is longer than {longest} bytes", str(path))
    return data
