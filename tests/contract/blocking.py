"""The blocking client behind the asyncio client's face, so that one suite tests both.

A method is awaited here exactly if it is a coroutine function of the asyncio class; each call of
the blocking client runs in a thread.
"""

from __future__ import annotations

import asyncio
import inspect
from typing import Any, Self, cast

from loaderd.client import (
    AsyncCacheClient,
    AsyncClient,
    AsyncDeletionPlan,
    AsyncDownloadOperation,
    AsyncGenerationStream,
    AsyncLease,
    AsyncLoadOperation,
    AsyncModel,
    AsyncModelWatch,
    AsyncVerifyOperation,
    CacheClient,
    Client,
    DeletionPlan,
    DownloadOperation,
    GenerationStream,
    Lease,
    LoadOperation,
    Model,
    ModelWatch,
    VerifyOperation,
)

PAIRS: dict[type, type] = {
    Client: AsyncClient,
    CacheClient: AsyncCacheClient,
    Model: AsyncModel,
    Lease: AsyncLease,
    ModelWatch: AsyncModelWatch,
    GenerationStream: AsyncGenerationStream,
    LoadOperation: AsyncLoadOperation,
    DownloadOperation: AsyncDownloadOperation,
    VerifyOperation: AsyncVerifyOperation,
    DeletionPlan: AsyncDeletionPlan,
}
"""Each public class of the blocking client, and its asyncio counterpart."""

_END = object()


def as_async(client: Client) -> AsyncClient:
    """The client, to be used like an asyncio one."""
    return cast("AsyncClient", _Face(client))


class _Face:
    def __init__(self, target: Any) -> None:
        self._target = target
        self._like = PAIRS[type(target)]

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if not callable(value):
            return _wrap(value)

        async def awaited(*args: Any, **kwargs: Any) -> Any:
            return _wrap(await asyncio.to_thread(value, *args, **kwargs))

        def plain(*args: Any, **kwargs: Any) -> Any:
            return _wrap(value(*args, **kwargs))

        return awaited if inspect.iscoroutinefunction(getattr(self._like, name)) else plain

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        item = await asyncio.to_thread(next, self._target, _END)
        if item is _END:
            raise StopAsyncIteration
        return _wrap(item)

    async def __aenter__(self) -> Self:
        self._target.__enter__()
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        await asyncio.to_thread(self._target.__exit__, *exc_info)


def _wrap(value: Any) -> Any:
    if isinstance(value, list):
        return [_wrap(item) for item in value]
    return _Face(value) if type(value) in PAIRS else value
