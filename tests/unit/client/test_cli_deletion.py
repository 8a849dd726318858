"""The commands rm and prune: what goes, what stays, and that nobody deletes unasked."""

from __future__ import annotations

import pytest

from loaderd.cli.exits import ExitCode
from loaderd.client import Client
from tests.fake_daemon import FakeDaemon
from tests.fake_daemon.cache import TOTAL, commit_of, old_commit_of
from tests.unit.client.ctl import Ctl, document


def test_rm_deletes_with_yes(ctl: Ctl, daemon: FakeDaemon) -> None:
    daemon.cache.superseded = {"demo/chat"}

    one = ctl("rm", f"demo/chat@{old_commit_of('demo/chat')}", "--yes")
    rest = ctl("rm", "demo/chat", "demo/base", "-y")

    assert one.stdout == "deleted 1 snapshot, 38.0 MB; the cache takes 160.0 MB now\n"
    assert rest.stdout == "deleted 2 snapshots, 80.0 MB; the cache takes 80.0 MB now\n"
    assert daemon.cache.superseded == set()
    assert not {"demo/chat", "demo/base"} & daemon.cache.cached


def test_a_dry_run_of_rm_deletes_nothing(ctl: Ctl, daemon: FakeDaemon) -> None:
    shown = ctl("rm", "demo/chat", "demo/base", "--dry-run")
    plan = document(ctl("rm", "demo/chat", "--dry-run", "--json"))

    heading, *rows, total = shown.stdout.splitlines()
    assert heading.split() == ["REPOSITORY", "REFS", "COMMIT", "SIZE", "UNIQUE"]
    assert [row.split()[0] for row in rows] == ["demo/chat", "demo/base"]
    assert total == "would delete 2 snapshots, 80.0 MB"
    assert plan["freed_bytes"] == TOTAL
    assert {"demo/chat", "demo/base"} < daemon.cache.cached


def test_rm_leaves_everything_when_one_is_in_use(
    ctl: Ctl, daemon: FakeDaemon, client: Client
) -> None:
    client.load("demo/chat")
    in_use = f"demo/chat@{commit_of('demo/chat')[:12]} is in use by m-1"

    shown = ctl("rm", "demo/chat", "demo/base", "--dry-run")
    refused = ctl("rm", "demo/chat", "demo/base", "--yes")

    assert shown.exit_code == ExitCode.OK
    assert "stays, in use by m-1" in shown.stdout
    assert shown.stdout.splitlines()[-1] == "would delete nothing: not all of it is free"
    assert refused.exit_code == ExitCode.PRECONDITION
    assert (refused.stdout, refused.stderr) == ("", f"loaderctl: {in_use}; nothing was deleted\n")
    assert {"demo/chat", "demo/base"} < daemon.cache.cached


def test_rm_of_what_is_not_there(ctl: Ctl, daemon: FakeDaemon) -> None:
    before = set(daemon.cache.cached)

    assert ctl("rm", "demo/chat", "demo/remote", "--yes").exit_code == ExitCode.NOT_FOUND
    assert daemon.cache.cached == before


@pytest.mark.parametrize("command", [("rm", "demo/chat"), ("prune", "--unreferenced")])
def test_nothing_is_deleted_unasked(ctl: Ctl, daemon: FakeDaemon, command: tuple[str, ...]) -> None:
    piped = ctl(*command, stdin="y\n")
    as_json = ctl(*command, "--json")

    assert (piped.exit_code, as_json.exit_code) == (ExitCode.USAGE, ExitCode.USAGE)
    assert piped.stderr == (
        "loaderctl: give --yes to delete files without a terminal to ask on, or --dry-run to see "
        f"what would go (see `loaderctl {command[0]} --help`)\n"
    )
    assert "give --yes to delete files with --json" in as_json.stderr
    assert daemon.calls == []


def test_prune_takes_what_meets_a_condition(ctl: Ctl, daemon: FakeDaemon) -> None:
    daemon.cache.superseded = {"demo/chat", "demo/base"}
    daemon.cache.orphans = {"left-over": 5_000_000}

    shown = ctl("prune", "--unreferenced", "--orphans", "--dry-run")
    assert shown.stdout.splitlines()[-1] == (
        "would delete 2 snapshots and 1 unfinished or left-over file, 81.0 MB"
    )
    pruned = ctl("prune", "--unreferenced", "--orphans", "--yes")
    assert pruned.stdout == (
        "deleted 2 snapshots and 1 unfinished or left-over file, 81.0 MB; "
        "the cache takes 160.0 MB now\n"
    )
    assert (daemon.cache.superseded, daemon.cache.orphans) == (set(), {})
    again = ctl("prune", "--unreferenced", "--orphans", "--yes")
    assert (again.exit_code, again.stdout) == (ExitCode.OK, "")
    assert again.stderr == "loaderctl: there is nothing to delete\n"
    assert ctl("prune", "--orphans", "--dry-run").stdout == "would delete nothing\n"


def test_prune_passes_its_conditions_on(ctl: Ctl, daemon: FakeDaemon) -> None:
    ctl("prune", "--unused-for", "36500d", "--max-size", "1.5TB", "--yes")

    request = daemon.last("PruneCache").request
    assert (request.unused_for.seconds, request.max_bytes) == (36_500 * 86_400, 1_500_000_000_000)
    assert [field.name for field, _ in request.ListFields()] == ["unused_for", "max_bytes"]
    ctl("prune", "--orphans", "--dry-run")
    request = daemon.last("PruneCache").request
    assert [field.name for field, _ in request.ListFields()] == ["orphans", "dry_run"]


def test_prune_keeps_what_is_in_use(ctl: Ctl, daemon: FakeDaemon, client: Client) -> None:
    client.load("demo/chat")

    pruned = ctl("prune", "--max-size", "0B", "--unused-for", "30d", "--yes")

    assert pruned.exit_code == ExitCode.OK
    assert pruned.stderr == (
        f"loaderctl: demo/chat@{commit_of('demo/chat')[:12]} is in use by m-1; it stays\n"
    )
    assert daemon.cache.cached == {"demo/chat"}


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((), "give at least one of --orphans, --unreferenced, --unused-for and --max-size"),
        (("--max-size", "50"), "'50' is no size; write one as 50GB, 1.5TB or 512MiB"),
        (("--unused-for", "-1d"), "'-1d' is no time span; write one as 30d, 12h or 90m"),
    ],
)
def test_prune_refuses_what_makes_no_sense(
    ctl: Ctl, daemon: FakeDaemon, args: tuple[str, ...], text: str
) -> None:
    result = ctl("prune", "--yes", *args)

    assert result.exit_code == ExitCode.USAGE
    assert text in result.stderr
    assert daemon.calls == []
