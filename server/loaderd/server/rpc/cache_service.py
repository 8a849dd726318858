"""loaderd.v1.CacheService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from loaderd.server.errors import InvalidArgumentError, InvalidNameError
from loaderd.server.models.registry import ModelRegistry
from loaderd.server.rpc import convert_cache as convert
from loaderd.server.store.keeper import Target
from loaderd.server.store.names import HubName, LocalName, parse_name
from loaderd.server.store.resolve import CachedSnapshot, LocalFolder
from loaderd.server.store.store import ModelStore
from loaderd.server.store.verifications import Verified
from loaderd.v1 import cache_pb2, cache_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class CacheService(cache_pb2_grpc.CacheServiceServicer):
    """Model files on disk: resolve, download, list, verify, delete."""

    def __init__(self, registry: ModelRegistry, store: ModelStore) -> None:
        self._registry = registry
        self._store = store

    async def ResolveModel(
        self, request: cache_pb2.ResolveModelRequest, context: Context
    ) -> cache_pb2.ResolveModelResponse:
        """Says where files are, or what a download would fetch."""
        found = await self._store.look_up(parse_name(request.model), refresh=request.refresh)
        match found:
            case LocalFolder():
                local = cache_pb2.LocalFolder(path=str(found.path), size_bytes=found.size_bytes)
                return cache_pb2.ResolveModelResponse(local=local)
            case CachedSnapshot():
                return cache_pb2.ResolveModelResponse(cached=await self._snapshot(found))
            case plan:
                return cache_pb2.ResolveModelResponse(download=convert.download_plan(plan))

    async def DownloadModel(
        self, request: cache_pb2.DownloadModelRequest, context: Context
    ) -> AsyncIterator[cache_pb2.DownloadModelResponse]:
        """Streams the plan, progress, then the snapshot."""
        self._registry.check_open()
        planned = False
        async with self._store.download(_hub_name(request.model)) as download:
            async for state in download.progress():
                if state.plan is not None and not planned:
                    planned = True
                    plan = convert.download_plan(state.plan)
                    yield cache_pb2.DownloadModelResponse(plan=plan)
                progress = convert.download_progress(state.progress)
                yield cache_pb2.DownloadModelResponse(progress=progress)
            files = await download.result()
        yield cache_pb2.DownloadModelResponse(snapshot=await self._snapshot(files))

    async def CancelDownload(
        self, request: cache_pb2.CancelDownloadRequest, context: Context
    ) -> cache_pb2.CancelDownloadResponse:
        """Stops a download for all who wait for it."""
        waiters, kept = await self._store.cancel(_hub_name(request.model))
        return cache_pb2.CancelDownloadResponse(waiters=waiters, kept_bytes=kept)

    async def ListSnapshots(
        self, request: cache_pb2.ListSnapshotsRequest, context: Context
    ) -> cache_pb2.ListSnapshotsResponse:
        """All snapshots, and the downloads under way."""
        return convert.listing(await self._store.snapshots(), self._store.holders)

    async def VerifySnapshot(
        self, request: cache_pb2.VerifySnapshotRequest, context: Context
    ) -> AsyncIterator[cache_pb2.VerifySnapshotResponse]:
        """Streams progress and problems, then the report."""
        self._registry.check_open()
        name = _hub_name(request.model)
        verified = None
        async with aclosing(self._store.verify(name, repair=request.repair)) as updates:
            async for update in updates:
                if isinstance(update, Verified):
                    verified = update
                else:
                    yield convert.verify_update(update)
        if verified is not None:  # described now that the verification itself uses it no more
            yield await self._report(verified)

    async def DeleteSnapshots(
        self, request: cache_pb2.DeleteSnapshotsRequest, context: Context
    ) -> cache_pb2.DeleteSnapshotsResponse:
        """Deletes the snapshots that are named."""
        self._registry.check_open()
        if not request.models:
            raise InvalidArgumentError("models", "name at least one of them")
        targets = [_target(model) for model in request.models]
        deletion = await self._store.delete(targets, dry_run=request.dry_run)
        return cache_pb2.DeleteSnapshotsResponse(deletion=convert.deletion(deletion))

    async def PruneCache(
        self, request: cache_pb2.PruneCacheRequest, context: Context
    ) -> cache_pb2.PruneCacheResponse:
        """Deletes what meets the conditions."""
        self._registry.check_open()
        policy = convert.prune_policy(request)
        deletion = await self._store.prune(policy, dry_run=request.dry_run)
        return cache_pb2.PruneCacheResponse(deletion=convert.deletion(deletion))

    async def _snapshot(self, files: CachedSnapshot) -> cache_pb2.Snapshot:
        info = await self._store.describe(files.repo_id, files.commit)
        return convert.snapshot(info, self._store.holders(info), stale=files.stale)

    async def _report(self, verified: Verified) -> cache_pb2.VerifySnapshotResponse:
        info = await self._store.describe(verified.repo_id, verified.commit)
        snapshot = convert.snapshot(info, self._store.holders(info))
        report = convert.verify_report(verified, snapshot)
        return cache_pb2.VerifySnapshotResponse(report=report)


def _hub_name(model: str) -> HubName:
    name = parse_name(model)
    if isinstance(name, LocalName):
        raise InvalidNameError("model", "is a local folder, and the cache has none; give org/name")
    return name


def _target(model: str) -> Target:
    name = parse_name(model, "models")
    if isinstance(name, LocalName):
        raise InvalidNameError("models", "a local folder is not in the cache; give org/name")
    return Target(name.repo_id, name.revision if "@" in model else None)
