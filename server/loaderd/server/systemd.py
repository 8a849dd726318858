"""Tells systemd how the daemon is, as sd_notify(3) has it: datagrams to a unix socket."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import MutableMapping

logger = logging.getLogger(__name__)


class Systemd:
    """The service manager that has started the daemon; nobody, if none has.

    Args:
        environment: Says where it listens. Its variables are taken out, so that workers do not
            speak in the daemon's place.
    """

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        path = environment.pop("NOTIFY_SOCKET", "")
        period_us = environment.pop("WATCHDOG_USEC", "")
        watched = environment.pop("WATCHDOG_PID", str(os.getpid()))
        self._address = "\0" + path[1:] if path.startswith("@") else path
        is_watched = path and period_us.isdecimal() and watched == str(os.getpid())
        self._period_s = int(period_us) / 1e6 if is_watched else 0.0

    def ready(self, status: str) -> None:
        """The daemon serves, or has read its settings again.

        Args:
            status: A line for people.
        """
        self._tell("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """The daemon begins to read its settings again; `ready` tells of the end."""
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._tell("RELOADING=1", f"MONOTONIC_USEC={now_us}")

    def stopping(self) -> None:
        """The daemon begins to shut down."""
        self._tell("STOPPING=1", "STATUS=draining")

    async def watch(self) -> None:
        """Says that the event loop runs, as often as was asked for, until it is cancelled."""
        while self._period_s:
            self._tell("WATCHDOG=1")
            await asyncio.sleep(self._period_s / 2)

    def _tell(self, *assignments: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.sendto("\n".join(assignments).encode(), self._address)
        except OSError as error:
            logger.warning("cannot tell systemd %s: %s", assignments[0], error)
