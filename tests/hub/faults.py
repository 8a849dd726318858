"""Faults of a hub and of the network to it.

A fault takes the right answer and gives a wrong one, or raises instead. It runs in the thread
that answers the request, so it may also take its time. `Hub.inject` says which requests it
meets; several faults that meet one request apply one after the other.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from tests.hub.exchange import Response

Fault: TypeAlias = Callable[[Response, threading.Event], Response]
"""Called with the right answer and the event that the hub stops."""


class ResetConnectionError(Exception):
    """Raised by a fault: the hub sends TCP RST."""


class CloseConnectionError(Exception):
    """Raised by a fault: the hub closes the connection in good order."""


def status(code: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> Fault:
    """Answers with this instead: errors, rate limits, redirects, nonsense."""

    def fault(_response: Response, _stopped: threading.Event) -> Response:
        return Response.text(code, body, "text/plain", headers)

    return fault


def rewrite(change: Callable[[Any], Any]) -> Fault:
    """Changes what a JSON answer says; a link to the next page stays."""

    def fault(response: Response, _stopped: threading.Event) -> Response:
        answer = json.loads(b"".join(response.body))
        kept = {k: v for k, v in response.headers.items() if k.lower() == "link"}
        return Response.json(change(answer), kept)

    return fault


def alter_headers(**changes: str | None) -> Fault:
    """Sets headers, or takes them away with None; `_` in a name stands for `-`."""
    wanted = {name.replace("_", "-").lower(): value for name, value in changes.items()}

    def fault(response: Response, _stopped: threading.Event) -> Response:
        kept = {k: v for k, v in response.headers.items() if k.lower() not in wanted}
        added = {k: v for k, v in wanted.items() if v is not None}
        return replace(response, headers={**kept, **added})

    return fault


def hang(*, after_bytes: int | None = None, seconds: float | None = None) -> Fault:
    """Goes silent before the status line, or after some of the body.

    Args:
        after_bytes: How much of the body to send first; None sends nothing at all.
        seconds: How long; then the answer goes on. None lasts until the hub stops.
    """

    def silence(stopped: threading.Event) -> None:
        if stopped.wait(seconds):
            raise CloseConnectionError

    def fault(response: Response, stopped: threading.Event) -> Response:
        if after_bytes is None:
            silence(stopped)
            return response
        return replace(response, body=body(response.body, after_bytes, stopped))

    def body(chunks: Iterable[bytes], first: int, stopped: threading.Event) -> Iterator[bytes]:
        head, tail = _split(chunks, first)
        yield from head
        silence(stopped)
        yield from tail

    return fault


def reset(*, after_bytes: int) -> Fault:
    """Resets the connection (TCP RST) after some of the body; see `short_body` for a FIN."""
    return _cut(after_bytes, ResetConnectionError)


def short_body(*, after_bytes: int) -> Fault:
    """Closes the connection in good order before the promised length is sent."""
    return _cut(after_bytes, CloseConnectionError)


def wrong_bytes(*, offset: int = 0) -> Fault:
    """Flips the bits of the byte at `offset` of the body; the size stays right."""

    def fault(response: Response, _stopped: threading.Event) -> Response:
        return replace(response, body=body(response.body))

    def body(chunks: Iterable[bytes]) -> Iterator[bytes]:
        head, tail = _split(chunks, offset)
        yield from head
        for number, chunk in enumerate(tail):
            yield chunk if number else bytes([chunk[0] ^ 0xFF]) + chunk[1:]

    return fault


def throttle(bytes_per_second: float) -> Fault:
    """Limits the rate of what is sent, all connections together."""
    pace = _Pace(bytes_per_second)
    # Ten steps a second, so that a slow line trickles instead of coming in gushes.
    step = max(1, int(min(bytes_per_second / 10, 1 << 18)))

    def fault(response: Response, stopped: threading.Event) -> Response:
        return replace(response, body=body(response.body, stopped))

    def body(chunks: Iterable[bytes], stopped: threading.Event) -> Iterator[bytes]:
        for chunk in chunks:
            for start in range(0, len(chunk), step):
                piece = chunk[start : start + step]
                if stopped.wait(pace.delay(len(piece))):
                    raise CloseConnectionError
                yield piece

    return fault


class _Pace:
    """Says how long to wait before each piece, so that a rate is kept. Thread-safe."""

    def __init__(self, bytes_per_second: float) -> None:
        if bytes_per_second <= 0:
            raise ValueError("the rate must be positive")
        self._seconds_per_byte = 1 / bytes_per_second
        self._free_at = 0.0
        self._lock = threading.Lock()

    def delay(self, size: int) -> float:
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + size * self._seconds_per_byte
            return self._free_at - now


def _cut(after_bytes: int, error: type[Exception]) -> Fault:
    def fault(response: Response, _stopped: threading.Event) -> Response:
        return replace(response, body=body(response.body))

    def body(chunks: Iterable[bytes]) -> Iterator[bytes]:
        head, _ = _split(chunks, after_bytes)
        yield from head
        raise error

    return fault


def _split(chunks: Iterable[bytes], first: int) -> tuple[Iterator[bytes], Iterator[bytes]]:
    """The first bytes and the others, both as chunks; the first must be taken before."""
    source = iter(chunks)
    rest: list[bytes] = []

    def head() -> Iterator[bytes]:
        left = first
        while left and (chunk := next(source, b"")):
            if len(chunk) > left:
                rest.append(chunk[left:])
            yield chunk[:left]
            left -= min(left, len(chunk))

    def tail() -> Iterator[bytes]:
        yield from rest
        yield from source

    return head(), tail()
