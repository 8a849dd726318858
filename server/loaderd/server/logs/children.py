"""The log lines of child processes, which come out of the daemon's log.

A child writes JSON lines to its standard error, a pipe. What else comes there, such as what
native libraries print, is taken as lines too.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from contextvars import Context
from datetime import datetime

from loaderd.server.logs.lines import FIELDS, log_to

_READ_BYTES = 1 << 16
_LONGEST_LINE = 1 << 16
_OTHER_OUTPUT = "loaderd.child"


def log_to_daemon() -> None:
    """Sends what this process, a child, logs to the daemon."""
    log_to(sys.stderr, "json", "info")


class ChildLog:
    """Takes the standard error of a child into the daemon's log.

    Args:
        fields: What each of its lines says of the child, such as `worker`; see `FIELDS`.

    Attributes:
        fields: What was given; may change while the child runs.
        stderr: The end of the pipe for the child, until `begun`.
    """

    def __init__(self, **fields: object) -> None:
        self.fields = fields
        self._read, self.stderr = os.pipe()
        os.set_blocking(self._read, False)
        self._rest = b""
        self._open = True
        self._loop = asyncio.get_running_loop()
        # In no call's context: a child outlives the call that it was started for.
        Context().run(self._loop.add_reader, self._read, self.take)

    def begun(self) -> None:
        """Gives up the child's end: it has started, or never will."""
        os.close(self.stderr)

    def take(self) -> None:
        """Logs all that the child has written by now."""
        while self._open:
            try:
                data = os.read(self._read, _READ_BYTES)
            except BlockingIOError:
                return
            if not data:
                self._close()
            *lines, self._rest = (self._rest + data).split(b"\n")
            if not data or len(self._rest) > _LONGEST_LINE:
                lines, self._rest = [*lines, self._rest], b""
            for line in filter(None, map(bytes.rstrip, lines)):
                self._log(line)

    def _close(self) -> None:
        self._open = False
        self._loop.remove_reader(self._read)
        os.close(self._read)

    def _log(self, line: bytes) -> None:
        record = _record_of(line)
        vars(record).update(self.fields)
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)


def _record_of(line: bytes) -> logging.LogRecord:
    text = line.decode(errors="backslashreplace")
    try:
        given = json.loads(text)
        record = _record(given["logger"], _level(given["level"]), given["message"])
        record.created = datetime.fromisoformat(given["time"]).timestamp()
        record.exc_text = given.get("exception")
        vars(record).update({name: given[name] for name in FIELDS if name in given})
    except (ValueError, TypeError, KeyError, RecursionError):
        return _record(_OTHER_OUTPUT, logging.INFO, text)
    return record


def _level(name: str) -> int:
    return logging.getLevelNamesMapping()[name.upper()]


def _record(name: str, level: int, message: str) -> logging.LogRecord:
    if not isinstance(name, str):
        raise TypeError(name)
    return logging.LogRecord(name, level, "", 0, str(message), None, None)
