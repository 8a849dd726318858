"""Server-sent events: a generation as it comes."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def comment(text: str) -> bytes:
    """What clients skip; it shows that the connection lives."""
    return f": {text}\n\n".encode()


class EventStream(StreamingResponse):
    """Sends events, and closes where they come from when it ends, however it ends.

    Args:
        events: The events.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        # Proxies that collect an answer before they pass it on are asked not to.
        super().__init__(events, headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        self._events = events

    async def __call__(
        self,
        scope: Scope,  # noqa: ARG002 - the protocol's signature
        receive: Receive,  # noqa: ARG002
        send: Send,
    ) -> None:
        """Sends all."""
        async with aclosing(self._events):
            await self.stream_response(send)
