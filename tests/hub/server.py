"""HTTP for the local hub: reads requests, sends answers, and breaks off as it is told."""

from __future__ import annotations

import contextlib
import os
import socket
import socketserver
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, urlsplit

from tests.hub.exchange import HubRequest, Response
from tests.hub.faults import CloseConnectionError, ResetConnectionError

Answer: TypeAlias = Callable[[HubRequest, threading.Event], Response]
"""Answers a request; the event is set when the server stops."""


class Server(ThreadingHTTPServer):
    """Knows its open connections, so that it can cut them."""

    daemon_threads = True
    # Many clients may come at once; the default of 5 lets the others wait for a second.
    request_queue_size = 128

    def __init__(self, port: int, answer: Answer) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.answer = answer
        self.stopped = threading.Event()
        self._open: set[socket.socket] = set()
        self._open_lock = threading.Lock()

    def cut(self) -> None:
        """Stops accepting and closes every connection, whatever it is doing."""
        self.stopped.set()
        self.shutdown()
        self.server_close()
        with self._open_lock:
            for connection in self._open:
                # It may be closed already, from the other side or by a reset.
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def server_bind(self) -> None:
        # HTTPServer looks the host's name up, which takes long where there is no name server.
        socketserver.TCPServer.server_bind(self)
        self.server_port = self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._open_lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, asks the hub, sends its answer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def handle(self) -> None:
        # Clients may break off at any time, and so may the hub when it is stopped.
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Says nothing: the hub records its requests instead."""

    def _serve(self) -> None:
        url = urlsplit(self.path)
        request = HubRequest(
            method=self.command,
            path=url.path,
            query=dict(parse_qsl(url.query)),
            range=self.headers.get("Range"),
            token=self.headers.get("Authorization", "").removeprefix("Bearer ") or None,
        )
        try:
            self._send(request, self.server.answer(request, self.server.stopped))
        except CloseConnectionError:
            self.close_connection = True
        except ResetConnectionError:
            self._reset()

    def _send(self, request: HubRequest, response: Response) -> None:
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.end_headers()
        request.status = response.status
        if self.command == "HEAD":
            return
        for chunk in response.body:
            self.wfile.write(chunk)
            request.sent_bytes += len(chunk)

    def _reset(self) -> None:
        # With no time to linger, closing sends RST. It must be the first thing that closes:
        # the server would send FIN before.
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
