"""The audit log: who did what to the daemon, and how it went."""

from __future__ import annotations

import json
import logging
import os
import stat
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

logger = logging.getLogger(__name__)

_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK


class AuditLog:
    """Appends a JSON line for each action.

    The file is opened again when another one has its place, as after a rotation. A line is with the
    kernel before the action's caller hears of its end. One that cannot be written goes to the log,
    as an error.

    Args:
        path: The file, made with mode 0600 if there is none; None: standard output.

    Raises:
        OSError: The file cannot be opened, or is none.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file = sys.stdout.fileno() if path is None else _opened(path)
        self._torn = False

    def write(self, entry: Mapping[str, object]) -> None:
        """Appends a line.

        Args:
            entry: What it says, beside the time. No secrets, prompts or outputs.
        """
        time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = json.dumps({"time": time, **entry}, default=str)
        try:
            self._follow_rotation()
            self._append(line.encode() + b"\n")
        except OSError as error:
            logger.error(
                "the audit log %s cannot be written: %s; it lacks this line: %s",
                self._path or "on standard output",
                error.strerror,
                line,
            )

    def close(self) -> None:
        """Closes the file."""
        if self._path is not None:
            os.close(self._file)

    def _append(self, line: bytes) -> None:
        data = b"\n" + line if self._torn else line
        while data:
            written = os.write(self._file, data)
            self._torn = written < len(data)
            data = data[written:]

    def _follow_rotation(self) -> None:
        if self._path is None:
            return
        ours = os.fstat(self._file)
        try:
            there = self._path.stat()
        except FileNotFoundError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
            reopened = _opened(self._path)
            os.close(self._file)
            self._file, self._torn = reopened, False


def _opened(path: Path) -> int:
    file = os.open(path, _FLAGS, 0o600)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(0, "it is not a regular file")
    return file
