"""Settings of the gRPC channel, and the rules for deadlines. Shared by both clients."""

from __future__ import annotations

import math

from google.protobuf.message import Message

from loaderd.client.connection import Connection
from loaderd.client.errors import InvalidArgumentError
from loaderd.client.status import CallContext

DEFAULT_TIMEOUT = 60.0
"""Seconds that a call which neither streams nor generates may take."""

_MESSAGE_LIMIT = 64 * 1024 * 1024

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", _MESSAGE_LIMIT),
    ("grpc.max_send_message_length", _MESSAGE_LIMIT),
    # A daemon that hangs or a cable that is out is found while a stream waits. The ping time-out
    # is set apart: the keepalive time-out alone found a stopped peer only after a minute.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    # A daemon that was restarted is found within seconds, not after gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # The daemon is on this box or near it; a web proxy of the environment is not meant for it.
    ("grpc.enable_http_proxy", 0),
]


def check_timeout(timeout: float | None) -> float | None:
    """The deadline that gRPC takes: None for none, also for an infinite one.

    Raises:
        InvalidArgumentError: It is not above 0.
    """
    if timeout is None or timeout == math.inf:
        return None
    if not timeout > 0:
        raise InvalidArgumentError.of("timeout", f"must be above 0 seconds, not {timeout!r}")
    return timeout


def call_context(connection: Connection, request: Message, timeout: float | None) -> CallContext:
    """What the errors of this call may tell."""
    return CallContext(
        connection.address,
        timeout,
        getattr(request, "request_id", None) or None,
        tls=connection.credentials is not None,
    )
