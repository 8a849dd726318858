"""Handles of loads, downloads and verifications under way."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

from loaderd.client.aio.lease import AsyncLease
from loaderd.client.aio.model import AsyncModel
from loaderd.client.aio.stream import AsyncStream
from loaderd.client.aio.transport import AsyncResponseStream, AsyncTransport
from loaderd.client.receivers import DownloadReceiver, LoadReceiver, VerifyReceiver
from loaderd.client.types import (
    DownloadPlan,
    DownloadProgress,
    LoadProgress,
    Snapshot,
    VerifyReport,
    VerifyUpdate,
)
from loaderd.v1 import cache_pb2, model_pb2

Message = TypeVar("Message")
Progress = TypeVar("Progress")
Result = TypeVar("Result")


class AsyncOperation(AsyncStream[Message, Progress], ABC, Generic[Message, Progress, Result]):
    """Work of the daemon that reports progress and ends in a result.

    Iterate for progress; `result` waits for the end. Dropping the handle gives up waiting, and
    the daemon stops the work when nobody else waits for it.
    """

    @abstractmethod
    async def result(self) -> Result:
        """Waits for the end and returns what came out."""

    async def wait(self, on_progress: Callable[[Progress], object] | None) -> Result:
        """Reports each progress to `on_progress`, and returns the result.

        What `on_progress` returns is awaited if that is possible.
        """
        async with self:
            async for progress in self:
                if on_progress is not None:
                    outcome = on_progress(progress)
                    if inspect.isawaitable(outcome):
                        await outcome
            return await self.result()

    async def _read_to_end(self) -> None:
        async for _ in self:
            pass


class AsyncLoadOperation(AsyncOperation[model_pb2.LoadModelResponse, LoadProgress, AsyncModel]):
    """A load under way; made by `AsyncClient.start_load`."""

    def __init__(
        self,
        transport: AsyncTransport,
        responses: AsyncResponseStream[model_pb2.LoadModelResponse],
    ) -> None:
        self._transport = transport
        self._load = LoadReceiver()
        super().__init__(responses, self._load)

    async def result(self) -> AsyncModel:
        """Waits for the model and returns it, READY.

        Raises:
            LoaderdError: The load failed, or was cancelled.
        """
        await self._read_to_end()
        return AsyncModel(self._transport, self._load.result)

    async def leased(self) -> AsyncLease:
        """Waits for the model and returns the lease that was asked for with it.

        Raises:
            LoaderdError: The load failed, or was cancelled.
        """
        await self._read_to_end()
        lease = self._load.lease
        return AsyncLease(
            self._transport, lease, AsyncModel(self._transport, self._load.result, lease.id)
        )


class AsyncDownloadOperation(
    AsyncOperation[cache_pb2.DownloadModelResponse, DownloadProgress, Snapshot]
):
    """A download under way; made by `AsyncCacheClient.start_download`."""

    def __init__(self, responses: AsyncResponseStream[cache_pb2.DownloadModelResponse]) -> None:
        self._download = DownloadReceiver()
        super().__init__(responses, self._download)

    @property
    def plan(self) -> DownloadPlan | None:
        """What it fetches; None before that is known, and when the hub is not asked or mute."""
        return self._download.plan

    async def result(self) -> Snapshot:
        """Waits for the snapshot and returns it, complete.

        Raises:
            LoaderdError: The download failed, or was cancelled.
        """
        await self._read_to_end()
        return self._download.result


class AsyncVerifyOperation(
    AsyncOperation[cache_pb2.VerifySnapshotResponse, VerifyUpdate, VerifyReport]
):
    """A verification under way; made by `AsyncCacheClient.start_verify`.

    It yields how far it is, each problem as it is found, and how far a repair is.
    """

    def __init__(self, responses: AsyncResponseStream[cache_pb2.VerifySnapshotResponse]) -> None:
        self._verification = VerifyReceiver()
        super().__init__(responses, self._verification)

    async def result(self) -> VerifyReport:
        """Waits for the report and returns it.

        Raises:
            LoaderdError: The verification, or the repair, failed or was cancelled.
        """
        await self._read_to_end()
        return self._verification.result
