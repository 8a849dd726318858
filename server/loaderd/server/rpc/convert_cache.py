"""Between the store's types and the messages of loaderd/v1/cache.proto."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

from google.protobuf.duration_pb2 import Duration

from loaderd.server.errors import InvalidArgumentError
from loaderd.server.store.deletion import Deletion, PrunePolicy
from loaderd.server.store.listing import CacheListing, Download
from loaderd.server.store.plan import DownloadPlan, DownloadProgress
from loaderd.server.store.scan import SnapshotInfo
from loaderd.server.store.verifications import Verified
from loaderd.server.store.verify import FileProblem, VerifyProgress
from loaderd.v1 import cache_pb2

Holders = Callable[[SnapshotInfo], Sequence[str]]
"""Who uses a snapshot."""


def duration(seconds: float | None) -> Duration | None:
    """Seconds as a Duration."""
    if seconds is None:
        return None
    message = Duration()
    message.FromTimedelta(timedelta(seconds=seconds))
    return message


def download_progress(progress: DownloadProgress) -> cache_pb2.DownloadProgress:
    """How far a download is."""
    return cache_pb2.DownloadProgress(
        downloaded_bytes=progress.downloaded_bytes,
        total_bytes=progress.total_bytes,
        completed_files=progress.completed_files,
        total_files=progress.total_files,
        bytes_per_second=progress.bytes_per_second,
        files=[
            cache_pb2.FileProgress(
                path=file.path, downloaded_bytes=file.downloaded_bytes, size_bytes=file.size_bytes
            )
            for file in progress.files
        ],
        remaining=duration(progress.remaining_s),
        resumed_bytes=progress.resumed_bytes,
        refetched_bytes=progress.refetched_bytes,
    )


def download_plan(plan: DownloadPlan) -> cache_pb2.DownloadPlan:
    """What a download would fetch."""
    return cache_pb2.DownloadPlan(
        repo_id=plan.repo_id,
        revision=plan.revision,
        commit=plan.commit,
        files=[
            cache_pb2.PlannedFile(
                path=file.path,
                size_bytes=file.size_bytes,
                cached=file.cached,
                partial_bytes=file.partial_bytes,
            )
            for file in plan.files
        ],
        total_bytes=plan.total_bytes,
        missing_bytes=plan.missing_bytes,
        skipped=[
            cache_pb2.SkippedFile(
                path=file.path,
                size_bytes=file.size_bytes,
                reason=cache_pb2.SkipReason.Value(f"SKIP_REASON_{file.reason.name}"),
            )
            for file in plan.skipped
        ],
        skipped_count=plan.skipped_count,
        skipped_bytes=plan.skipped_bytes,
    )


def snapshot(
    info: SnapshotInfo, holders: Sequence[str], *, stale: bool = False
) -> cache_pb2.Snapshot:
    """A snapshot, and who uses it; stale when the hub could not say whether it is current."""
    message = cache_pb2.Snapshot(
        repo_id=info.repo_id,
        commit=info.commit,
        refs=info.refs,
        size_bytes=info.size_bytes,
        file_count=info.file_count,
        complete=info.complete,
        path=str(info.path),
        stale=stale,
        unique_bytes=info.unique_bytes,
        in_use_by=holders,
    )
    message.modified_at.FromDatetime(info.modified_at)
    message.last_used_at.FromDatetime(info.last_used_at)
    return message


def listing(cache: CacheListing, holders: Holders) -> cache_pb2.ListSnapshotsResponse:
    """All that the cache holds, and who uses it."""
    return cache_pb2.ListSnapshotsResponse(
        snapshots=[snapshot(info, holders(info)) for info in cache.snapshots],
        total_bytes=cache.total_bytes,
        orphan_bytes=cache.orphan_bytes,
        downloads=map(_download, cache.downloads),
        free_bytes=cache.free_bytes,
        max_bytes=cache.max_bytes or 0,
    )


def _download(download: Download) -> cache_pb2.Download:
    return cache_pb2.Download(
        model=str(download.name),
        progress=download_progress(download.state.progress),
        waiters=download.waiters,
    )


def verify_update(
    update: VerifyProgress | FileProblem | DownloadProgress,
) -> cache_pb2.VerifySnapshotResponse:
    """What a verification says before its report."""
    match update:
        case VerifyProgress():
            return cache_pb2.VerifySnapshotResponse(progress=verify_progress(update))
        case FileProblem():
            return cache_pb2.VerifySnapshotResponse(problem=_problem(update))
        case DownloadProgress():
            return cache_pb2.VerifySnapshotResponse(repair=download_progress(update))


def verify_progress(progress: VerifyProgress) -> cache_pb2.VerifyProgress:
    """How far a verification is."""
    return cache_pb2.VerifyProgress(
        verified_bytes=progress.verified_bytes,
        total_bytes=progress.total_bytes,
        verified_files=progress.verified_files,
        total_files=progress.total_files,
        bytes_per_second=progress.bytes_per_second,
    )


def verify_report(verified: Verified, described: cache_pb2.Snapshot) -> cache_pb2.VerifyReport:
    """What a verification found."""
    report = verified.report
    return cache_pb2.VerifyReport(
        snapshot=described,
        problems=map(_problem, report.problems),
        repaired=verified.repaired,
        verified_files=report.verified_files,
        verified_bytes=report.verified_bytes,
        unverifiable_files=report.unverifiable_files,
    )


def _problem(problem: FileProblem) -> cache_pb2.FileProblem:
    return cache_pb2.FileProblem(
        path=problem.path,
        kind=cache_pb2.ProblemKind.Value(f"PROBLEM_KIND_{problem.kind.name}"),
        expected=problem.expected,
        found=problem.found,
    )


def prune_policy(request: cache_pb2.PruneCacheRequest) -> PrunePolicy:
    """What a client wants to be deleted.

    Raises:
        InvalidArgumentError: No condition is given, or one is out of bounds.
    """
    unused_for = None
    if request.HasField("unused_for"):
        unused_for = request.unused_for.ToTimedelta()
        if unused_for < timedelta():
            raise InvalidArgumentError("unused_for", "must not be negative")
    policy = PrunePolicy(
        orphans=request.orphans,
        unreferenced=request.unreferenced,
        unused_for=unused_for,
        max_bytes=request.max_bytes if request.HasField("max_bytes") else None,
    )
    if policy == PrunePolicy():
        problem = "give at least one of orphans, unreferenced, unused_for and max_bytes"
        raise InvalidArgumentError("orphans", problem)
    return policy


def deletion(plan: Deletion) -> cache_pb2.Deletion:
    """What is deleted, and what stays because somebody uses it."""
    return cache_pb2.Deletion(
        snapshots=[snapshot(info, ()) for info in plan.snapshots],
        freed_bytes=plan.freed_bytes,
        orphan_files=len(plan.orphans),
        kept=[snapshot(info, plan.holders[info.path]) for info in plan.kept],
        remaining_bytes=plan.remaining_bytes,
    )
