"""Streams that the caller iterates over."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from loaderd.client.aio.transport import AsyncResponseStream
from loaderd.client.receivers import GenerationReceiver, Receiver, WatchReceiver
from loaderd.client.types import Delta, GenerationResult, GenerationStarted, WatchUpdate
from loaderd.v1 import generation_pb2, model_pb2

Message = TypeVar("Message")
Item = TypeVar("Item")


class AsyncStream(Generic[Message, Item]):
    """Items as they come from the daemon.

    Iterate over it to the end, or use it as a context manager, or call `cancel`. Dropping it
    before its end cancels the call, so that the daemon stops working for it. So does cancelling
    a task that waits for an item.
    """

    def __init__(
        self, responses: AsyncResponseStream[Message], receiver: Receiver[Message, Item, Any]
    ) -> None:
        self._responses = responses
        self._receiver = receiver

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Item:
        async for message in self._responses:
            item = self._receiver.take(message)
            if item is not None:
                return item
        self._receiver.end()
        raise StopAsyncIteration

    def cancel(self) -> None:
        """Stops the call. Going on to iterate raises `CallCancelledError`."""
        self._responses.cancel()

    async def close(self) -> None:
        """Stops the call if it has not ended."""
        self._responses.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


class AsyncModelWatch(AsyncStream[model_pb2.WatchModelsResponse, WatchUpdate]):
    """All models, then every change; made by `AsyncClient.watch`."""

    def __init__(self, responses: AsyncResponseStream[model_pb2.WatchModelsResponse]) -> None:
        super().__init__(responses, WatchReceiver())


class AsyncGenerationStream(AsyncStream[generation_pb2.StreamGenerateResponse, Delta]):
    """Text as it comes; made by `AsyncModel.stream`."""

    def __init__(
        self, responses: AsyncResponseStream[generation_pb2.StreamGenerateResponse]
    ) -> None:
        self._generation = GenerationReceiver()
        super().__init__(responses, self._generation)

    @property
    def queue_position(self) -> int | None:
        """How many requests go before this one; None when it has its turn, or is not told."""
        return self._generation.queue_position

    @property
    def started(self) -> GenerationStarted | None:
        """What is known of the request; None before the first delta."""
        return self._generation.started

    @property
    def result(self) -> GenerationResult:
        """All deltas put together, with usage, timings and how it ended.

        Raises:
            RuntimeError: The stream has not been read to its end.
        """
        return self._generation.result
