"""The fake's CacheService."""
# ruff: noqa: N802 - names of the protocol

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import grpc

from loaderd.v1 import cache_pb2, cache_pb2_grpc
from tests.fake_daemon.cache import FILES, FREE_BYTES, TOTAL, Key, commit_of, verify_steps
from tests.fake_daemon.deletion import delete, prune
from tests.fake_daemon.downloads import download_progress
from tests.fake_daemon.failure import FailureError

if TYPE_CHECKING:
    from tests.fake_daemon.daemon import FakeDaemon


class CacheService(cache_pb2_grpc.CacheServiceServicer):
    def __init__(self, daemon: FakeDaemon) -> None:
        self._daemon = daemon
        self._cache = daemon.cache

    def ResolveModel(
        self, request: cache_pb2.ResolveModelRequest, context: Any
    ) -> cache_pb2.ResolveModelResponse:
        response = cache_pb2.ResolveModelResponse()
        with self._daemon.seen("ResolveModel", request, context).follow(context):
            repo_id = self._cache.check_name(request.model)
            if repo_id.startswith("/"):
                response.local.path, response.local.size_bytes = repo_id, TOTAL
            elif repo_id in self._cache.cached:
                response.cached.CopyFrom(self._cache.snapshot((repo_id, commit_of(repo_id))))
                response.cached.stale = request.refresh and not self._cache.hub_answers
            else:
                self._require_hub(request.model)
                response.download.CopyFrom(self._cache.plan(repo_id))
        return response

    def DownloadModel(
        self, request: cache_pb2.DownloadModelRequest, context: grpc.ServicerContext
    ) -> Iterator[cache_pb2.DownloadModelResponse]:
        with self._daemon.seen("DownloadModel", request, context).follow(context):
            repo_id = self._cache.check_name(request.model)
            if repo_id.startswith("/"):
                raise FailureError("INVALID_NAME", field="model", problem="is a local path")
            if repo_id not in self._cache.cached:
                self._require_hub(request.model)
                yield cache_pb2.DownloadModelResponse(plan=self._cache.plan(repo_id))
                with self._daemon.downloads.join(request.model, repo_id) as download:
                    while True:
                        yield cache_pb2.DownloadModelResponse(progress=download.progress)
                        if not self._daemon.pause(context, self._daemon.step_s):
                            return
                        if download.cancelled.is_set():
                            raise FailureError("DOWNLOAD_CANCELLED", model=request.model)
                        if download.is_done:
                            break
                        if repo_id != "demo/stalled":
                            download.advance()
            snapshot = self._cache.snapshot((repo_id, commit_of(repo_id)))
            snapshot.stale = not self._cache.hub_answers
            yield cache_pb2.DownloadModelResponse(snapshot=snapshot)

    def CancelDownload(
        self, request: cache_pb2.CancelDownloadRequest, context: Any
    ) -> cache_pb2.CancelDownloadResponse:
        with self._daemon.seen("CancelDownload", request, context).follow(context):
            return self._daemon.downloads.cancel(request.model)

    def ListSnapshots(
        self, request: cache_pb2.ListSnapshotsRequest, context: Any
    ) -> cache_pb2.ListSnapshotsResponse:
        cache = self._cache
        with self._daemon.seen("ListSnapshots", request, context).follow(context):
            return cache_pb2.ListSnapshotsResponse(
                snapshots=map(cache.snapshot, cache.held()),
                total_bytes=cache.size_of(cache.held()),
                orphan_bytes=sum(cache.orphans.values()),
                downloads=self._daemon.downloads.all(),
                free_bytes=FREE_BYTES,
                max_bytes=cache.max_bytes,
            )

    def VerifySnapshot(
        self, request: cache_pb2.VerifySnapshotRequest, context: grpc.ServicerContext
    ) -> Iterator[cache_pb2.VerifySnapshotResponse]:
        with self._daemon.seen("VerifySnapshot", request, context).follow(context):
            key = self._snapshot_to_verify(request.model)
            problems = {problem.path: problem for problem in self._cache.problems.get(key[0], [])}
            for path, progress in zip(FILES, verify_steps(), strict=True):
                yield cache_pb2.VerifySnapshotResponse(progress=progress)
                if path in problems:
                    yield cache_pb2.VerifySnapshotResponse(problem=problems[path])
                if not self._daemon.pause(context, self._daemon.step_s):
                    return
            if problems and request.repair:
                self._require_hub(request.model)
                broken = sum(FILES[path] for path in problems)
                for downloaded in (TOTAL - broken, TOTAL):
                    repair = download_progress(downloaded)
                    yield cache_pb2.VerifySnapshotResponse(repair=repair)
                del self._cache.problems[key[0]]
            unverifiable = self._cache.unverifiable.get(key[0], [])
            sound = [path for path in FILES if path not in {*problems, *unverifiable}]
            report = cache_pb2.VerifyReport(
                snapshot=self._cache.snapshot(key),
                problems=problems.values(),
                repaired=bool(problems) and request.repair,
                verified_files=len(sound),
                verified_bytes=sum(FILES[path] for path in sound),
                unverifiable_files=unverifiable,
            )
            yield cache_pb2.VerifySnapshotResponse(report=report)

    def DeleteSnapshots(
        self, request: cache_pb2.DeleteSnapshotsRequest, context: Any
    ) -> cache_pb2.DeleteSnapshotsResponse:
        with self._daemon.seen("DeleteSnapshots", request, context).follow(context):
            deletion = delete(self._cache, request.models, dry_run=request.dry_run)
            return cache_pb2.DeleteSnapshotsResponse(deletion=deletion)

    def PruneCache(
        self, request: cache_pb2.PruneCacheRequest, context: Any
    ) -> cache_pb2.PruneCacheResponse:
        with self._daemon.seen("PruneCache", request, context).follow(context):
            return cache_pb2.PruneCacheResponse(deletion=prune(self._cache, request))

    def _snapshot_to_verify(self, name: str) -> Key:
        """The snapshot of a name, whose revision is main if it has none."""
        keys = self._cache.find(name)
        if "@" not in name:
            keys = self._cache.find(f"{name}@main")
        return keys[0]

    def _require_hub(self, name: str) -> None:
        if not self._cache.hub_answers:
            raise FailureError("HUB_UNREACHABLE", model=name)
