"""The socket and the server of HTTP, inside the daemon's event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

_MAX_CONNECTIONS = 1024
_KEEP_ALIVE_S = 75
_MAX_HEAD_BYTES = 1 << 16


class _Server(uvicorn.Server):
    """A server that leaves the process's signals to the daemon."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


class HttpListener:
    """Serves an application on one address.

    Args:
        host: The host.
        port: The port; 0 for a free one.
        is_loopback: Tells the hosts that are this box as it calls itself.

    Attributes:
        url: Where it listens.

    Raises:
        OSError: The address cannot be listened on.
    """

    def __init__(self, host: str, port: int, is_loopback: Callable[[str], bool]) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family)
        shown = f"[{host}]" if family is socket.AF_INET6 else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}"
        self._is_exposed = not is_loopback(host)
        self._is_loopback = is_loopback
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None

    def is_own_host(self, host: str) -> bool:
        """Whether requests may name a host: any, where the listener has names of its own."""
        return self._is_exposed or self._is_loopback(host)

    def start(self, app: ASGIApp) -> None:
        """Serves."""
        self._server = _Server(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",  # the application logs in the daemon's own words
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=_MAX_CONNECTIONS,
                timeout_keep_alive=_KEEP_ALIVE_S,
                h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
            )
        )
        self._task = asyncio.create_task(self._server.serve([self._socket]))

    async def stop(self, grace_s: float) -> None:
        """Refuses new connections, and cuts requests that still run after `grace_s` seconds."""
        if self._server is None or self._task is None:
            self._socket.close()
            return
        self._server.config.timeout_graceful_shutdown = max(1, round(grace_s))
        self._server.should_exit = True
        await self._task
