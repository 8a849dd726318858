"""What the fake saw of a call."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc_status import rpc_status

from tests.fake_daemon.failure import FailureError


class Seen:
    """One call: what came, and how it ended.

    Attributes:
        method: Name of the RPC.
        request: A copy of the request.
        time_remaining: Seconds to its deadline when it arrived; None: it has none.
        metadata: What it carried beside the request.
        cancelled: Set when the client left before the answer was complete.
    """

    def __init__(self, method: str, request: Message, context: grpc.ServicerContext) -> None:
        self.method = method
        self.request: Any = type(request)()
        self.request.CopyFrom(request)
        self.time_remaining = context.time_remaining()
        metadata: Any = context.invocation_metadata()
        self.metadata: tuple[tuple[str, str], ...] = tuple(metadata)
        self.cancelled = threading.Event()
        self._answered = False

    @contextmanager
    def follow(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Runs a handler; its FailureError becomes the call's status."""
        if not context.add_callback(self._ended):
            self.cancelled.set()
        try:
            yield
            self._answered = True
        except FailureError as failure:
            self._answered = True
            context.abort_with_status(rpc_status.to_status(failure.status()))

    def _ended(self) -> None:
        if not self._answered:
            self.cancelled.set()
