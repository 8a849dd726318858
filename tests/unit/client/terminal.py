"""`loaderctl` under a pseudo-terminal.

Not with pexpect's own spawn: it forks, and the fake daemon's gRPC threads do not bear that.
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from types import TracebackType
from typing import Self

import pexpect
from pexpect.fdpexpect import fdspawn

WAIT_S = 60
CTRL_C, CTRL_D = "\x03", "\x04"
_ROWS = 24

# Makes the terminal the controlling one, so that Ctrl-C in it is a SIGINT, and goes on.
_LAUNCH = """
import fcntl, runpy, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.argv[0] = "loaderctl"
runpy.run_module("loaderd.cli", run_name="__main__")
"""


def _environment() -> dict[str, str]:
    """Without the size of the terminal that the tests run in, which would be believed."""
    size = ("COLUMNS", "LINES")
    return {k: v for k, v in os.environ.items() if k not in size} | {"TERM": "xterm"}


class Terminal:
    """A running `loaderctl`, and what is typed and shown there."""

    def __init__(self, *args: str, columns: int = 120) -> None:
        master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, columns, 0, 0))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env=_environment(),
        )
        os.close(slave)
        self._screen = fdspawn(master, encoding="utf-8", timeout=WAIT_S)

    def expect(self, pattern: str) -> None:
        """Waits until the pattern is shown."""
        self._screen.expect(pattern)

    def send(self, text: str) -> None:
        """Types."""
        self._screen.send(text)

    def sendline(self, text: str) -> None:
        """Types a line."""
        self._screen.sendline(text)

    def ending(self) -> int:
        """Waits for the end; the exit code."""
        self._screen.expect(pexpect.EOF)
        return self._process.wait(WAIT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait(WAIT_S)
        self._screen.close()


Spawn = Callable[..., Terminal]
"""Starts `loaderctl` with the arguments given."""
