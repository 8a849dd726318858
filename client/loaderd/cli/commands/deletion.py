"""Commands that delete model files: rm, prune."""

from __future__ import annotations

import sys
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from loaderd.cli import options, output
from loaderd.cli.commands.cache import snapshot_cells
from loaderd.cli.confirmation import is_confirmed, require_consent
from loaderd.cli.exits import ExitCode
from loaderd.cli.session import session_of
from loaderd.cli.units import count, parse_size, parse_span, size
from loaderd.cli.usage import UsageError

if TYPE_CHECKING:
    from typing import TextIO

    from loaderd.client import Deletion, Snapshot


def rm(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="org/name for all snapshots of a repository, org/name@revision for one.",
            show_default=False,
        ),
    ],
    dry_run: options.DryRun = False,
    yes: options.Yes = False,
    json: options.Json = False,
) -> None:
    """Delete snapshots from the daemon's cache: all of them, or none when one is in use."""
    require_consent(given=yes or dry_run, json=json)
    session = session_of(context)
    with session.connect() as client:
        plan = client.cache.plan_delete(*models, timeout=session.timeout)
        if dry_run:
            _show_plan(plan.deletion, json=json, all_or_none=True)
            return
        if plan.kept:
            for snapshot in plan.kept:
                output.message(f"{_in_use(snapshot)}; nothing was deleted")
            raise typer.Exit(ExitCode.PRECONDITION)
        if not yes and not _is_approved(plan.deletion):
            raise typer.Exit(ExitCode.FAILED)
        deletion = plan.execute(timeout=session.timeout)
    _show_result(deletion, json=json)


def prune(  # noqa: PLR0917 - an argument for each option
    context: typer.Context,
    orphans: Annotated[
        bool,
        typer.Option("--orphans", help="Files of no snapshot: unfinished and left-over ones."),
    ] = False,
    unreferenced: Annotated[
        bool, typer.Option("--unreferenced", help="Snapshots that no branch or tag points to.")
    ] = False,
    unused_for: Annotated[
        timedelta | None,
        typer.Option(
            metavar="SPAN",
            parser=options.parser(parse_span),
            help="Snapshots that were not used for so long: 30d, 12h, 90m.",
        ),
    ] = None,
    max_size: Annotated[
        int | None,
        typer.Option(
            metavar="SIZE",
            parser=options.parser(parse_size),
            help="The least recently used snapshots, until the cache is no larger: 50GB, 512MiB.",
        ),
    ] = None,
    dry_run: options.DryRun = False,
    yes: options.Yes = False,
    json: options.Json = False,
) -> None:
    """Delete what meets any of the conditions from the daemon's cache, except what is in use."""
    if not (orphans or unreferenced) and unused_for is None and max_size is None:
        raise UsageError(
            "give at least one of --orphans, --unreferenced, --unused-for and --max-size"
        )
    require_consent(given=yes or dry_run, json=json)
    session = session_of(context)
    with session.connect() as client:
        prune_cache = partial(
            client.cache.prune,
            orphans=orphans,
            unreferenced=unreferenced,
            unused_for=unused_for,
            max_bytes=max_size,
            timeout=session.timeout,
        )
        if dry_run:
            _show_plan(prune_cache(dry_run=True), json=json, all_or_none=False)
            return
        if not yes:
            plan = prune_cache(dry_run=True)
            if _is_empty(plan):
                _show_result(plan, json=False)
                return
            if not _is_approved(plan):
                raise typer.Exit(ExitCode.FAILED)
        deletion = prune_cache()
    _show_result(deletion, json=json)


def _is_approved(plan: Deletion) -> bool:
    """Shows what would go, and asks."""
    _show_snapshots(plan, sys.stderr)
    return is_confirmed(f"delete {_amount(plan)}?")


def _show_plan(plan: Deletion, *, json: bool, all_or_none: bool) -> None:
    if json:
        output.json_result(plan)
        return
    _show_snapshots(plan, sys.stdout)
    if all_or_none and plan.kept:
        output.result("would delete nothing: not all of it is free")
    elif _is_empty(plan):
        output.result("would delete nothing")
    else:
        output.result(f"would delete {_amount(plan)}")


def _show_result(deletion: Deletion, *, json: bool) -> None:
    if json:
        output.json_result(deletion)
        return
    for snapshot in deletion.kept:
        output.message(f"{_in_use(snapshot)}; it stays")
    if _is_empty(deletion):
        output.message("there is nothing to delete")
    else:
        left = f"the cache takes {size(deletion.remaining_bytes)} now"
        output.result(f"deleted {_amount(deletion)}; {left}")


def _show_snapshots(plan: Deletion, file: TextIO) -> None:
    rows = [
        *((*snapshot_cells(snapshot), "goes") for snapshot in plan.snapshots),
        *(
            (*snapshot_cells(snapshot), f"stays, in use by {_holders(snapshot)}")
            for snapshot in plan.kept
        ),
    ]
    if rows:
        output.table(("REPOSITORY", "REFS", "COMMIT", "SIZE", "UNIQUE", ""), rows, file)


def _amount(deletion: Deletion) -> str:
    """What goes, in words."""
    parts = []
    if deletion.snapshots:
        parts.append(count(len(deletion.snapshots), "snapshot"))
    if deletion.orphan_files:
        parts.append(count(deletion.orphan_files, "unfinished or left-over file"))
    return f"{' and '.join(parts)}, {size(deletion.freed_bytes)}"


def _is_empty(deletion: Deletion) -> bool:
    return not deletion.snapshots and not deletion.orphan_files


def _in_use(snapshot: Snapshot) -> str:
    return f"{snapshot.repo_id}@{snapshot.commit[:12]} is in use by {_holders(snapshot)}"


def _holders(snapshot: Snapshot) -> str:
    return ", ".join(snapshot.in_use_by)
