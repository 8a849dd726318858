"""loaderd.v1.CacheService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from loaderd.server.errors import InvalidNameError
from loaderd.server.models.registry import ModelRegistry
from loaderd.server.rpc import convert
from loaderd.server.store.names import LocalName, parse_name
from loaderd.server.store.resolve import CachedSnapshot, LocalFolder
from loaderd.server.store.store import ModelStore
from loaderd.v1 import cache_pb2, cache_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class CacheService(cache_pb2_grpc.CacheServiceServicer):
    """Model files on disk: resolve, download, list."""

    def __init__(self, registry: ModelRegistry, store: ModelStore) -> None:
        self._registry = registry
        self._store = store

    async def ResolveModel(
        self, request: cache_pb2.ResolveModelRequest, context: Context
    ) -> cache_pb2.ResolveModelResponse:
        """Says where files are, or what a download would fetch."""
        files = await self._store.resolve(parse_name(request.model))
        if isinstance(files, LocalFolder):
            local = cache_pb2.LocalFolder(path=str(files.path), size_bytes=files.size_bytes)
            return cache_pb2.ResolveModelResponse(local=local)
        if isinstance(files, CachedSnapshot):
            return cache_pb2.ResolveModelResponse(
                cached=convert.snapshot(await self._store.snapshot(files))
            )
        if self._store.settings.offline and files.problem is not None:
            raise files.problem
        plan = await self._store.plan(files.name)
        return cache_pb2.ResolveModelResponse(download=convert.download_plan(plan))

    async def DownloadModel(
        self, request: cache_pb2.DownloadModelRequest, context: Context
    ) -> AsyncIterator[cache_pb2.DownloadModelResponse]:
        """Streams progress, then the snapshot."""
        self._registry.check_open()
        name = parse_name(request.model)
        if isinstance(name, LocalName):
            raise InvalidNameError("model", "a local folder cannot be downloaded")
        async with self._store.download(name) as download:
            async for progress in download.progress():
                yield cache_pb2.DownloadModelResponse(progress=convert.download_progress(progress))
            files = await download.result()
        info = await self._store.snapshot(files)
        snapshot = convert.snapshot(info, stale=files.stale)
        yield cache_pb2.DownloadModelResponse(snapshot=snapshot)

    async def ListSnapshots(
        self, request: cache_pb2.ListSnapshotsRequest, context: Context
    ) -> cache_pb2.ListSnapshotsResponse:
        """All snapshots."""
        cache = await self._store.snapshots()
        return cache_pb2.ListSnapshotsResponse(
            snapshots=map(convert.snapshot, cache.snapshots), total_bytes=cache.total_bytes
        )
