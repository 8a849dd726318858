"""Commands on model files: pull, ls, resolve."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from loaderd.cli import options, output
from loaderd.cli.progress import progress_display
from loaderd.cli.session import session_of
from loaderd.cli.units import age, count, size

if TYPE_CHECKING:
    from loaderd.client import DownloadPlan, Snapshot


def pull(context: typer.Context, model: options.Model, json: options.Json = False) -> None:
    """Download a model into the daemon's cache without loading it."""
    session = session_of(context)
    with session.connect() as client, progress_display(model) as display:
        snapshot = client.cache.download(
            model, on_progress=display.download, timeout=session.timeout
        )
    if snapshot.stale:
        output.message("the hub did not answer; what the cache had is used, and may be out of date")
    if json:
        output.json_result(snapshot)
    else:
        output.result(
            f"{snapshot.repo_id} is cached at commit {snapshot.commit[:12]}, "
            f"{count(snapshot.file_count, 'file')}, {size(snapshot.size_bytes)}"
        )


def ls(context: typer.Context, json: options.Json = False) -> None:
    """List the model snapshots in the daemon's cache."""
    session = session_of(context)
    with session.connect() as client:
        snapshots = client.cache.snapshots(timeout=session.timeout)
    if json:
        output.json_result(snapshots)
        return
    if not snapshots:
        output.message("the cache is empty; see `loaderctl pull --help`")
        return
    columns = ("REPOSITORY", "REFS", "COMMIT", "SIZE", "FILES", "STATE", "MODIFIED")
    output.table(columns, map(_row, snapshots))
    total = f"{size(snapshots.total_bytes)} on disk"
    output.result(f"{count(len(snapshots), 'snapshot')}, {total}")


def resolve(context: typer.Context, model: options.Model, json: options.Json = False) -> None:
    """Say where a model's files are, or what a download would fetch."""
    from loaderd.client import LocalFolder, Snapshot

    session = session_of(context)
    with session.connect() as client:
        resolution = client.cache.resolve(model, timeout=session.timeout)
    match resolution:
        case LocalFolder():
            kind = "local"
            lines = [("local folder", resolution.path), ("size", size(resolution.size_bytes))]
        case Snapshot():
            kind = "cached"
            lines = [
                ("cached", resolution.path),
                ("commit", resolution.commit),
                ("refs", ", ".join(resolution.refs)),
                (
                    "size",
                    f"{size(resolution.size_bytes)} in {count(resolution.file_count, 'file')}",
                ),
            ]
        case _:
            kind, lines = "download", _plan(resolution)
    if json:
        output.json_result({"kind": kind, **output.plain(resolution)})
    else:
        output.fields(lines)


def _plan(plan: DownloadPlan) -> list[tuple[str, str]]:
    missing = [file for file in plan.files if not file.cached]
    return [
        ("not cached", f"{plan.repo_id} at {plan.revision}"),
        ("commit", plan.commit),
        ("download", f"{size(plan.missing_bytes)} of {size(plan.total_bytes)}"),
        *((f"  {file.path}", size(file.size_bytes)) for file in missing),
    ]


def _row(snapshot: Snapshot) -> tuple[str, ...]:
    return (
        snapshot.repo_id,
        ", ".join(snapshot.refs) or "-",
        snapshot.commit[:12],
        size(snapshot.size_bytes),
        str(snapshot.file_count),
        "complete" if snapshot.complete else "incomplete",
        age(snapshot.modified_at),
    )
