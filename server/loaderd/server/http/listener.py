"""The socket and the server of HTTP, inside the daemon's event loop."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import h11
import uvicorn
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from loaderd.server.addresses import TcpAddress, is_loopback
from loaderd.server.http.errors import refusal

_MAX_CONNECTIONS = 1024
_KEEP_ALIVE_S = 75
_FIRST_REQUEST_S = 10.0
_MAX_HEAD_BYTES = 1 << 16
_NO_REQUEST = f"this is no request of HTTP/1.1, or its head has more than {_MAX_HEAD_BYTES} bytes"


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

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - ours says it our way
        """Answers what is no request, and closes the connection."""
        if self.cycle is not None:  # a request whose body breaks off so has no other answer
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            answer = refusal(HTTPException(400, _NO_REQUEST, {"connection": "close"}))
            self._write(h11.Response(status_code=400, headers=answer.raw_headers))
            self._write(h11.Data(data=bytes(answer.body)))
            self._write(h11.EndOfMessage())
        self.transport.close()

    def _write(self, event: h11.Event) -> None:
        self.transport.write(self.conn.send(event) or b"")

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

    def has_room(self) -> bool:
        """Whether there is room for the connections that are open."""
        return self._server is None or (
            len(self._server.server_state.connections) <= _MAX_CONNECTIONS
        )

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
