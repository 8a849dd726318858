"""Commands on model files: pull, ls, resolve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from loaderd.cli import options, output
from loaderd.cli.meter import amounts
from loaderd.cli.progress import progress_display
from loaderd.cli.session import session_of
from loaderd.cli.units import age, count, size
from loaderd.cli.usage import UsageError

if TYPE_CHECKING:
    from loaderd.cli.session import Session
    from loaderd.client import (
        Client,
        Download,
        DownloadPlan,
        PlannedFile,
        Resolution,
        Snapshot,
        SnapshotList,
    )

_COLUMNS = ("REPOSITORY", "REFS", "COMMIT", "SIZE", "UNIQUE", "STATE", "LAST USED", "IN USE BY")
_SHOWN_SKIPPED = 10


def pull(
    context: typer.Context,
    model: options.Model,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be fetched and skipped, and fetch nothing."),
    ] = False,
    cancel: Annotated[
        bool, typer.Option("--cancel", help="Stop the download of this model that others run.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Download a model into the daemon's cache without loading it.

    What came before an interruption is kept, and the next pull goes on from there.
    """
    if dry_run and cancel:
        raise UsageError("--dry-run does not go with --cancel")
    session = session_of(context)
    with session.connect() as client:
        if dry_run:
            resolution = client.cache.resolve(model, refresh=True, timeout=session.timeout)
            _show_resolution(resolution, json=json)
        elif cancel:
            _cancel(client, session, model, json=json)
        else:
            _pull(client, session, model, json=json)


def ls(context: typer.Context, json: options.Json = False) -> None:
    """List the model snapshots in the daemon's cache, and the downloads under way."""
    session = session_of(context)
    with session.connect() as client:
        snapshots = client.cache.snapshots(timeout=session.timeout)
    if json:
        output.json_result(snapshots)
        return
    if not snapshots:
        output.message("the cache has no snapshots; see `loaderctl pull --help`")
    else:
        columns = (
            "REPOSITORY",
            "REFS",
            "COMMIT",
            "SIZE",
            "UNIQUE",
            "STATE",
            "LAST USED",
            "IN USE BY",
        )
        output.table(columns, map(_row, snapshots))
    for download in snapshots.downloads:
        output.result(_download_line(download))
    output.result(_totals(snapshots))


def resolve(
    context: typer.Context,
    model: options.Model,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Ask the hub, also when the cache has a snapshot.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Say where a model's files are, or what a download would fetch."""
    session = session_of(context)
    with session.connect() as client:
        resolution = client.cache.resolve(model, refresh=refresh, timeout=session.timeout)
    _show_resolution(resolution, json=json)


def _pull(client: Client, session: Session, model: str, *, json: bool) -> None:
    progress = None
    try:
        with (
            progress_display(model) as display,
            client.cache.start_download(model, timeout=session.timeout) as operation,
        ):
            for progress in operation:
                display.download(progress)
            snapshot = operation.result()
    except KeyboardInterrupt:
        output.message(f"what came is kept: `loaderctl pull {model}` goes on from there")
        raise
    if progress is not None and progress.resumed_bytes:
        output.message(f"went on from {size(progress.resumed_bytes)} that were there already")
    if progress is not None and progress.refetched_bytes:
        output.message(
            f"{size(progress.refetched_bytes)} were fetched again: the hub did not go on in "
            "mid-file, or what had come was damaged"
        )
    if snapshot.stale:
        output.message(output.STALE)
    if json:
        output.json_result(snapshot)
    else:
        output.result(
            f"{snapshot.repo_id} is cached at commit {snapshot.commit[:12]}, "
            f"{count(snapshot.file_count, 'file')}, {size(snapshot.size_bytes)}"
        )


def _cancel(client: Client, session: Session, model: str, *, json: bool) -> None:
    cancelled = client.cache.cancel_download(model, timeout=session.timeout)
    if json:
        output.json_result(cancelled)
    elif not cancelled.waiters:
        output.message(f"there is no download of {model}")
    else:
        output.result(
            f"stopped the download of {model}, which {count(cancelled.waiters, 'call')} waited "
            f"for; {size(cancelled.kept_bytes)} of unfinished files are kept"
        )


def _show_resolution(resolution: Resolution, *, json: bool) -> None:
    from loaderd.client import LocalFolder, Snapshot

    match resolution:
        case LocalFolder():
            kind = "local"
            lines = [("local folder", resolution.path), ("size", size(resolution.size_bytes))]
        case Snapshot():
            kind, lines = "cached", _snapshot(resolution)
            if resolution.stale:
                output.message(output.STALE)
        case _:
            kind, lines = "download", _plan(resolution)
    if json:
        output.json_result({"kind": kind, **output.plain(resolution)})
    else:
        output.fields(lines)


def _snapshot(snapshot: Snapshot) -> list[tuple[str, str]]:
    return [
        ("cached", snapshot.path),
        ("commit", snapshot.commit),
        ("refs", ", ".join(snapshot.refs)),
        ("size", f"{size(snapshot.size_bytes)} in {count(snapshot.file_count, 'file')}"),
    ]


def _plan(plan: DownloadPlan) -> list[tuple[str, str]]:
    missing = [file for file in plan.files if not file.cached]
    lines = [
        ("not cached", f"{plan.repo_id} at {plan.revision}"),
        ("commit", plan.commit),
        ("download", f"{size(plan.missing_bytes)} of {size(plan.total_bytes)}"),
        *((f"  {file.path}", _planned_size(file)) for file in missing),
    ]
    if plan.skipped_count:
        lines.append(
            ("skipped", f"{count(plan.skipped_count, 'file')}, {size(plan.skipped_bytes)}")
        )
        for skipped in plan.skipped[:_SHOWN_SKIPPED]:
            reason = skipped.reason.name.lower().replace("_", " ")
            lines.append((f"  {skipped.path}", f"{size(skipped.size_bytes)}, {reason}"))
        if plan.skipped_count > _SHOWN_SKIPPED:
            lines.append(("  ...", f"and {plan.skipped_count - _SHOWN_SKIPPED} more"))
    return lines


def _planned_size(file: PlannedFile) -> str:
    if not file.partial_bytes:
        return size(file.size_bytes)
    return f"{size(file.size_bytes)}, of which {size(file.partial_bytes)} are there"


def snapshot_cells(snapshot: Snapshot) -> tuple[str, ...]:
    """The cells that every table of snapshots begins with: which one, and how large."""
    return (
        snapshot.repo_id,
        ", ".join(snapshot.refs) or "-",
        snapshot.commit[:12],
        size(snapshot.size_bytes),
        size(snapshot.unique_bytes),
    )


def _row(snapshot: Snapshot) -> tuple[str, ...]:
    return (
        *snapshot_cells(snapshot),
        "complete" if snapshot.complete else "incomplete",
        age(snapshot.last_used_at),
        ", ".join(snapshot.in_use_by) or "-",
    )


def _download_line(download: Download) -> str:
    how_far = amounts(download.progress, download.progress.remaining)
    return f"downloading {download.model}: {how_far}, {count(download.waiters, 'call')} waiting"


def _totals(snapshots: SnapshotList) -> str:
    parts = [count(len(snapshots), "snapshot"), f"{size(snapshots.total_bytes)} on disk"]
    if snapshots.orphan_bytes:
        parts.append(f"{size(snapshots.orphan_bytes)} in unfinished and left-over files")
    parts.append(f"{size(snapshots.free_bytes)} free")
    if snapshots.max_bytes is not None:
        parts.append(f"limit {size(snapshots.max_bytes)}")
    return ", ".join(parts)
