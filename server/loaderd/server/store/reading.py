"""Reading files in order to check them, which is no use of the model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO


def open_unnoticed(path: Path) -> BinaryIO:
    """Opens a file for reading; its time of last access stays where it may.

    Listing the cache would otherwise make every model look recently used.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        handle = os.open(path, flags | os.O_NOATIME)
    except PermissionError:  # only its owner may
        handle = os.open(path, flags)
    return os.fdopen(handle, "rb")
