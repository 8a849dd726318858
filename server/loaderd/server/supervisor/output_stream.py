"""What a worker sends for one request, until its client has taken it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from loaderd.server.errors import LoaderdError, SlowConsumerError
from loaderd.v1 import generation_pb2


class OutputStream:
    """A queue of stream messages that joins text that its reader has not taken yet.

    So a slow reader gets fewer, longer messages, and what waits for it is bounded.

    Args:
        max_bytes: Most bytes of text and token ids that may wait.
        on_end: Called when the last message, or the failure, has come from the worker. The reader
            may take what waits long after that, or never.
    """

    def __init__(self, max_bytes: int, on_end: Callable[[], None]) -> None:
        self._max_bytes = max_bytes
        self._on_end = on_end
        self._waiting: deque[generation_pb2.StreamGenerateResponse] = deque()
        self._waiting_bytes = 0
        self._error: LoaderdError | None = None
        self._changed = asyncio.Event()
        self.ended = False

    def put(self, message: generation_pb2.StreamGenerateResponse) -> None:
        """Adds a message; `finished` ends the stream, as does a reader that is too slow."""
        if self.ended:
            return
        size = _content_bytes(message)
        last = self._waiting[-1] if self._waiting else None
        if (
            message.HasField("delta")
            and last is not None
            and last.HasField("delta")
            and last.delta.index == message.delta.index
        ):
            last.delta.text += message.delta.text
            last.delta.token_ids.extend(message.delta.token_ids)
        else:
            self._waiting.append(message)
        self._waiting_bytes += size
        self._changed.set()
        if message.HasField("finished"):
            self._end()
        elif self._waiting_bytes > self._max_bytes:
            self.fail(SlowConsumerError(limit=self._max_bytes, unit="bytes"))

    def fail(self, error: LoaderdError) -> None:
        """Ends the stream with an error, after what waits already; nothing if it has ended."""
        if not self.ended:
            self._error = error
            self._changed.set()
            self._end()

    async def __aiter__(self) -> AsyncIterator[generation_pb2.StreamGenerateResponse]:
        """The messages.

        Raises:
            LoaderdError: The stream failed.
        """
        while True:
            while self._waiting:
                message = self._waiting.popleft()
                self._waiting_bytes -= _content_bytes(message)
                yield message
            if self._error is not None:
                raise self._error
            if self.ended:
                return
            self._changed.clear()
            await self._changed.wait()

    def _end(self) -> None:
        self.ended = True
        self._on_end()


def _content_bytes(message: generation_pb2.StreamGenerateResponse) -> int:
    """Bytes of what may grow; those of joined messages add up."""
    return len(message.delta.text.encode()) + 4 * len(message.delta.token_ids)
