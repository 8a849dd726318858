"""The socket and the server of HTTP, inside the daemon's event loop."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from loaderd.server.addresses import TcpAddress, is_loopback

_MAX_CONNECTIONS = 1024
_KEEP_ALIVE_S = 75
_FIRST_REQUEST_S = 10.0
_MAX_HEAD_BYTES = 1 << 16


class _Protocol(H11Protocol):
    """A connection that is cut when it does not begin with a request soon."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Waits for the first request."""
        super().connection_made(transport)
        self._patience = self.loop.call_later(_FIRST_REQUEST_S, self._cut)

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no more."""
        self._patience.cancel()
        super().connection_lost(exc)

    def _cut(self) -> None:
        if self.cycle is None:
            self.transport.close()


class _Server(uvicorn.Server):
    """A server that leaves the process's signals to the daemon."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


class HttpListener:
    """Serves an application on one address.

    Args:
        address: Where to listen; port 0 takes a free one.
        tls: What it speaks; None for plain HTTP.

    Raises:
        OSError: The address cannot be listened on.
    """

    def __init__(self, address: TcpAddress, tls: ssl.SSLContext | None = None) -> None:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        self._socket = socket.create_server((address.host, address.port), family=family)
        self._address = address.with_port(self._socket.getsockname()[1])
        self._tls = tls
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"{'http' if self._tls is None else 'https'}://{self._address}"

    def is_own_host(self, host: str) -> bool:
        """Whether requests may name a host: any, where the listener has names of its own."""
        return self._address.is_exposed or is_loopback(host)

    def start(self, app: ASGIApp) -> None:
        """Serves."""
        config = uvicorn.Config(
            app,
            http=_Protocol,
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
        config.load()
        config.ssl = self._tls
        self._server = _Server(config)
        self._task = asyncio.create_task(self._server.serve([self._socket]))

    async def stop(self, grace_s: float) -> None:
        """Refuses new connections, and cuts requests that still run after `grace_s` seconds."""
        if self._server is None or self._task is None:
            self._socket.close()
            return
        self._server.config.timeout_graceful_shutdown = max(1, round(grace_s))
        self._server.should_exit = True
        await self._task
