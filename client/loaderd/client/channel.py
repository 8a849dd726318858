"""Settings of the gRPC channel, and the rules for deadlines. Shared by both clients."""

from __future__ import annotations

import math
import secrets

from google.protobuf.message import Message

from loaderd.client.connection import Connection
from loaderd.client.errors import InvalidArgumentError
from loaderd.client.status import CallContext
from loaderd.client.tracing import trace_headers

DEFAULT_TIMEOUT = 60.0
"""Seconds that a call which neither streams nor generates may take."""

_REQUEST_ID_HEADER = "x-request-id"
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
    """What is known of this call: what it carries, and what its errors may tell.

    It carries the trace that its caller is in, if any.

    A request has an id from its caller, or gets one here, so that also an error that no daemon
    explained, such as a deadline's, can be found in the daemon's log.
    """
    own_id = getattr(request, "request_id", "")
    request_id = own_id or secrets.token_hex(8)
    named = () if own_id else ((_REQUEST_ID_HEADER, request_id),)
    return CallContext(
        connection.address,
        timeout,
        request_id,
        tls=connection.credentials is not None,
        metadata=(*named, *trace_headers()),
    )
