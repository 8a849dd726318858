"""The fake's cache: names, sizes, no files."""
# ruff: noqa: N802 - names of the protocol

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from loaderd.v1 import cache_pb2, cache_pb2_grpc
from tests.fake_daemon.failure import REASONS, FailureError, UnknownReasonError

if TYPE_CHECKING:
    from tests.fake_daemon.daemon import FakeDaemon

FILES = {"config.json": 700, "tokenizer.json": 2_000_000, "model.safetensors": 38_000_000}
TOTAL = sum(FILES.values())
CHUNK = 8_000_000
EXAMPLE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the documentation shows
ON_HUB = {EXAMPLE, "demo/chat", "demo/base", "demo/remote", "demo/stuck", "demo/stalled"}
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


def commit_of(repo_id: str) -> str:
    return hashlib.sha1(repo_id.encode(), usedforsecurity=False).hexdigest()


class Cache:
    """Which repositories are cached."""

    def __init__(self) -> None:
        self.cached = {EXAMPLE, "demo/chat", "demo/base", "demo/stuck"}
        self.hub_answers = True

    def check_name(self, name: str) -> str:
        """The repository of a name, or its path.

        Raises:
            FailureError: As the name asks for.
        """
        repo_id, _, revision = name.partition("@")
        if repo_id.startswith("/"):
            if not Path(repo_id).is_dir():
                raise FailureError("MODEL_NOT_FOUND", model=name)
            return repo_id
        if not _NAME.fullmatch(name):
            raise FailureError("INVALID_NAME", field="model", problem="must be org/name")
        org, _, rest = repo_id.partition("/")
        if org == "fail":
            reason = rest.upper().replace("-", "_")
            raise FailureError(reason) if reason in REASONS else UnknownReasonError()
        if repo_id not in ON_HUB:
            raise FailureError("MODEL_NOT_FOUND", model=name)
        if revision not in {"", "main", commit_of(repo_id)}:
            raise FailureError("REVISION_NOT_FOUND", model=name, revision=revision)
        return repo_id

    def snapshot(self, repo_id: str) -> cache_pb2.Snapshot:
        snapshot = cache_pb2.Snapshot(
            repo_id=repo_id,
            commit=commit_of(repo_id),
            refs=["main"],
            size_bytes=TOTAL,
            file_count=len(FILES),
            complete=True,
            path=f"/cache/models--{repo_id.replace('/', '--')}/snapshots/{commit_of(repo_id)}",
        )
        snapshot.modified_at.FromSeconds(1_700_000_000)
        snapshot.last_used_at.FromSeconds(1_700_000_100)
        return snapshot

    def progress(self, downloaded: int) -> cache_pb2.DownloadProgress:
        return cache_pb2.DownloadProgress(
            downloaded_bytes=downloaded,
            total_bytes=TOTAL,
            completed_files=len(FILES) if downloaded == TOTAL else 0,
            total_files=len(FILES),
            bytes_per_second=0 if downloaded == 0 else 25_000_000,
        )


def download_steps() -> list[int]:
    """Bytes after each step of a download."""
    return [*range(0, TOTAL, CHUNK), TOTAL]


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
                response.cached.CopyFrom(self._cache.snapshot(repo_id))
            else:
                response.download.CopyFrom(
                    cache_pb2.DownloadPlan(
                        repo_id=repo_id,
                        revision="main",
                        commit=commit_of(repo_id),
                        files=[
                            cache_pb2.PlannedFile(
                                path=path, size_bytes=size, cached=path == "config.json"
                            )
                            for path, size in FILES.items()
                        ],
                        total_bytes=TOTAL,
                        missing_bytes=TOTAL - FILES["config.json"],
                    )
                )
        return response

    def DownloadModel(
        self, request: cache_pb2.DownloadModelRequest, context: grpc.ServicerContext
    ) -> Iterator[cache_pb2.DownloadModelResponse]:
        with self._daemon.seen("DownloadModel", request, context).follow(context):
            repo_id = self._cache.check_name(request.model)
            if repo_id.startswith("/"):
                raise FailureError("INVALID_NAME", field="model", problem="is a local path")
            if repo_id not in self._cache.cached:
                for downloaded in download_steps():
                    progress = self._cache.progress(downloaded)
                    yield cache_pb2.DownloadModelResponse(progress=progress)
                    while True:
                        if not self._daemon.pause(context, self._daemon.step_s):
                            return
                        if repo_id != "demo/stalled":
                            break
                self._cache.cached.add(repo_id)
            snapshot = self._cache.snapshot(repo_id)
            snapshot.stale = not self._cache.hub_answers
            yield cache_pb2.DownloadModelResponse(snapshot=snapshot)

    def ListSnapshots(
        self, request: cache_pb2.ListSnapshotsRequest, context: Any
    ) -> cache_pb2.ListSnapshotsResponse:
        with self._daemon.seen("ListSnapshots", request, context).follow(context):
            names = sorted(self._cache.cached)
        return cache_pb2.ListSnapshotsResponse(
            snapshots=map(self._cache.snapshot, names), total_bytes=TOTAL * len(names)
        )
