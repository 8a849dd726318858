"""The daemon's cache of model files."""
# ruff: noqa: ASYNC109 - `timeout` is the call's deadline, which travels to the daemon

from __future__ import annotations

from collections.abc import Callable

from loaderd.client import responses
from loaderd.client.aio.operation import AsyncDownloadOperation
from loaderd.client.aio.transport import AsyncTransport
from loaderd.client.requests import ModelName, model_name
from loaderd.client.types import DownloadProgress, Resolution, Snapshot, SnapshotList
from loaderd.v1 import cache_pb2


class AsyncCacheClient:
    """Model files on disk. Reached as `AsyncClient.cache`."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def resolve(self, name: ModelName, *, timeout: float | None = None) -> Resolution:
        """Says where a model's files are, or what a download would fetch. Changes nothing."""
        request = cache_pb2.ResolveModelRequest(model=model_name(name))
        return responses.resolution(
            await self._transport.call(self._transport.stubs.cache.ResolveModel, request, timeout)
        )

    async def download(
        self,
        name: ModelName,
        *,
        on_progress: Callable[[DownloadProgress], object] | None = None,
        timeout: float | None = None,
    ) -> Snapshot:
        """Fetches a model's files, or what is missing of them, and returns the snapshot.

        Args:
            name: `org/name` or `org/name@revision`.
            on_progress: Called with each progress, and awaited if it returns an awaitable. What it
                raises cancels the download.
            timeout: Seconds; None: as long as it takes.
        """
        return await self.start_download(name, timeout=timeout).wait(on_progress)

    def start_download(
        self, name: ModelName, *, timeout: float | None = None
    ) -> AsyncDownloadOperation:
        """Starts what `download` does and returns its handle."""
        request = cache_pb2.DownloadModelRequest(model=model_name(name))
        return AsyncDownloadOperation(
            self._transport.stream(self._transport.stubs.cache.DownloadModel, request, timeout)
        )

    async def snapshots(self, *, timeout: float | None = None) -> SnapshotList:
        """All model snapshots in the cache."""
        request = cache_pb2.ListSnapshotsRequest()
        return responses.snapshot_list(
            await self._transport.call(self._transport.stubs.cache.ListSnapshots, request, timeout)
        )
