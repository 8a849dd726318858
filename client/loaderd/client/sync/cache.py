"""The daemon's cache of model files."""

from __future__ import annotations

from collections.abc import Callable

from loaderd.client import responses
from loaderd.client.parameters import Seconds
from loaderd.client.requests import ModelName, delete_request, model_name, prune_request
from loaderd.client.sync.deletion import DeletionPlan
from loaderd.client.sync.operation import DownloadOperation, VerifyOperation
from loaderd.client.sync.transport import Transport
from loaderd.client.types import (
    CancelledDownload,
    Deletion,
    DownloadProgress,
    Resolution,
    Snapshot,
    SnapshotList,
    VerifyReport,
    VerifyUpdate,
)
from loaderd.v1 import cache_pb2


class CacheClient:
    """Model files on disk. Reached as `Client.cache`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def resolve(
        self, name: ModelName, *, refresh: bool = False, timeout: float | None = None
    ) -> Resolution:
        """Says where a model's files are, or what a download would fetch. Changes nothing.

        Args:
            name: `org/name`, `org/name@revision`, or the path of a local folder.
            refresh: Ask the hub what the revision is now, also when the cache has a snapshot.
            timeout: Seconds; None: the client's default.
        """
        request = cache_pb2.ResolveModelRequest(model=model_name(name), refresh=refresh)
        return responses.resolution(
            self._transport.call(self._transport.stubs.cache.ResolveModel, request, timeout)
        )

    def download(
        self,
        name: ModelName,
        *,
        on_progress: Callable[[DownloadProgress], object] | None = None,
        timeout: float | None = None,
    ) -> Snapshot:
        """Fetches a model's files, or what is missing of them, and returns the snapshot.

        Args:
            name: `org/name` or `org/name@revision`.
            on_progress: Called with each progress. What it raises cancels the download.
            timeout: Seconds; None: as long as it takes.
        """
        return self.start_download(name, timeout=timeout).wait(on_progress)

    def start_download(self, name: ModelName, *, timeout: float | None = None) -> DownloadOperation:
        """Starts what `download` does and returns its handle."""
        request = cache_pb2.DownloadModelRequest(model=model_name(name))
        return DownloadOperation(
            self._transport.stream(self._transport.stubs.cache.DownloadModel, request, timeout)
        )

    def cancel_download(
        self, name: ModelName, *, timeout: float | None = None
    ) -> CancelledDownload:
        """Stops the download of a name for all who wait for it; what came of it is kept.

        Their calls end with `DownloadCancelledError`. Nothing happens when there is none.

        Args:
            name: As the download was asked for.
            timeout: Seconds; None: the client's default.
        """
        request = cache_pb2.CancelDownloadRequest(model=model_name(name))
        return responses.cancelled_download(
            self._transport.call(self._transport.stubs.cache.CancelDownload, request, timeout)
        )

    def snapshots(self, *, timeout: float | None = None) -> SnapshotList:
        """All model snapshots in the cache, and the downloads under way."""
        request = cache_pb2.ListSnapshotsRequest()
        return responses.snapshot_list(
            self._transport.call(self._transport.stubs.cache.ListSnapshots, request, timeout)
        )

    def verify(
        self,
        name: ModelName,
        *,
        repair: bool = False,
        on_progress: Callable[[VerifyUpdate], object] | None = None,
        timeout: float | None = None,
    ) -> VerifyReport:
        """Compares the content of every file of a snapshot with its hash.

        Problems are no error: look at the report's `ok`.

        Args:
            name: `org/name` or `org/name@revision`.
            repair: Fetch the files that have a problem again, and those only.
            on_progress: Called with each progress, and with each problem as it is found. What it
                raises cancels the verification.
            timeout: Seconds; None: as long as it takes.

        Raises:
            SnapshotNotFoundError: The cache has no snapshot of this name.
        """
        return self.start_verify(name, repair=repair, timeout=timeout).wait(on_progress)

    def start_verify(
        self, name: ModelName, *, repair: bool = False, timeout: float | None = None
    ) -> VerifyOperation:
        """Starts what `verify` does and returns its handle."""
        request = cache_pb2.VerifySnapshotRequest(model=model_name(name), repair=repair)
        return VerifyOperation(
            self._transport.stream(self._transport.stubs.cache.VerifySnapshot, request, timeout)
        )

    def plan_delete(self, *names: ModelName, timeout: float | None = None) -> DeletionPlan:
        """Says what deleting these snapshots would do. The plan's `execute` does it.

        Args:
            *names: `org/name` for all snapshots of a repository, `org/name@revision` for one.
            timeout: Seconds; None: the client's default.

        Raises:
            SnapshotNotFoundError: The cache has no snapshot of a name.
        """
        return DeletionPlan(self._transport, self._delete(names, dry_run=True, timeout=timeout))

    def delete(self, *names: ModelName, timeout: float | None = None) -> Deletion:
        """Deletes snapshots, and the files that no other snapshot shares: all of them or none.

        Args:
            *names: As for `plan_delete`.
            timeout: Seconds; None: the client's default.

        Raises:
            SnapshotNotFoundError: The cache has no snapshot of a name.
            SnapshotInUseError: A loaded model or a download uses one.
        """
        return self._delete(names, dry_run=False, timeout=timeout)

    def _delete(
        self, names: tuple[ModelName, ...], *, dry_run: bool, timeout: float | None
    ) -> Deletion:
        request = delete_request(names, dry_run=dry_run)
        return responses.deletion(
            self._transport.call(
                self._transport.stubs.cache.DeleteSnapshots, request, timeout
            ).deletion
        )

    def prune(
        self,
        *,
        orphans: bool = False,
        unreferenced: bool = False,
        unused_for: Seconds | None = None,
        max_bytes: int | None = None,
        dry_run: bool = False,
        timeout: float | None = None,
    ) -> Deletion:
        """Deletes what meets any of the conditions given, except what is in use.

        Args:
            orphans: What belongs to no snapshot: unfinished files that no download is writing, and
                files whose snapshots are gone.
            unreferenced: Snapshots that no branch or tag points to in the cache.
            unused_for: Snapshots that were not used for so long.
            max_bytes: The least recently used snapshots, until the cache is no larger.
            dry_run: Say what would be deleted, and delete nothing.
            timeout: Seconds; None: the client's default.

        Raises:
            InvalidArgumentError: No condition is given, or a value is out of bounds.
        """
        request = prune_request(
            orphans=orphans,
            unreferenced=unreferenced,
            unused_for=unused_for,
            max_bytes=max_bytes,
            dry_run=dry_run,
        )
        return responses.deletion(
            self._transport.call(self._transport.stubs.cache.PruneCache, request, timeout).deletion
        )
