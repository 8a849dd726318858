"""A child's life ends with the daemon's, whatever the daemon dies of."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Has the kernel kill this process when its parent dies; on Linux only.

    Raises:
        OSError: The kernel refused.
        ProcessLookupError: The parent died before this took effect.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        raise ProcessLookupError("the daemon ended while this process started")


def exit_when_closed(descriptor: int) -> None:
    """Ends this process as soon as the parent, who holds the other end open, closes it."""

    def watch() -> None:
        while os.read(descriptor, 4096):
            pass  # nothing more is meant to come
        logger.warning("the daemon is gone; ending")
        os._exit(0)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
