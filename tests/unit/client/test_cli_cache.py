"""The commands on model files: what they print, and how they end."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest

from loaderd.cli.exits import ExitCode
from loaderd.client import Client, errors
from loaderd.v1 import cache_pb2
from tests.fake_daemon import FakeDaemon
from tests.fake_daemon.cache import TOTAL, WEIGHTS, commit_of, old_commit_of
from tests.unit.client.ctl import Ctl, document


def lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_pull_ls_and_resolve(ctl: Ctl) -> None:
    plan = ctl("resolve", "demo/remote")
    assert lines(plan.stdout)[0] == ["not", "cached", "demo/remote", "at", "main"]
    assert "model.safetensors" in plan.stdout
    assert "config.json" not in plan.stdout  # that one is there
    planned = document(ctl("resolve", "demo/remote", "--json"))
    assert (planned["kind"], planned["total_bytes"]) == ("download", TOTAL)

    pulled = ctl("pull", "demo/remote")
    commit = commit_of("demo/remote")
    assert pulled.stdout == (f"demo/remote is cached at commit {commit[:12]}, 3 files, 40.0 MB\n")
    assert "downloading" in pulled.stderr
    assert document(ctl("pull", "demo/remote", "--json"))["commit"] == commit

    listing = ctl("ls").stdout.splitlines()
    row = next(line.split() for line in listing if line.startswith("demo/remote"))
    assert row[1:8] == ["main", commit[:12], "40.0", "MB", "40.0", "MB", "complete"]
    assert listing[-1] == "5 snapshots, 200.0 MB on disk, 50.0 GB free"
    as_json = document(ctl("ls", "--json"))
    assert as_json["total_bytes"] == 5 * TOTAL
    assert [s["repo_id"] for s in as_json["snapshots"]] == sorted(
        s["repo_id"] for s in as_json["snapshots"]
    )

    cached = ctl("resolve", "demo/remote")
    assert lines(cached.stdout)[1] == ["commit", commit]
    assert document(ctl("resolve", "demo/remote", "--json"))["kind"] == "cached"


def test_one_snapshot_is_no_plural(ctl: Ctl, daemon: FakeDaemon) -> None:
    daemon.cache.cached = {"demo/chat"}

    assert ctl("ls").stdout.splitlines()[-1] == "1 snapshot, 40.0 MB on disk, 50.0 GB free"


def test_what_may_be_out_of_date_is_said_to_be(ctl: Ctl, daemon: FakeDaemon) -> None:
    assert document(ctl("pull", "demo/chat", "--json"))["stale"] is False
    daemon.cache.hub_answers = False
    note = (
        "loaderctl: the hub did not answer or may not be asked; what the cache had is used, and "
        "may be out of date\n"
    )

    pulled, loaded = ctl("pull", "demo/chat"), ctl("load", "demo/chat")
    run = ctl("run", "demo/base", "x")

    assert pulled.stdout.startswith("demo/chat is cached at commit")
    assert pulled.stderr == note
    assert loaded.stderr.endswith(note)
    assert run.stderr.endswith(note)
    assert document(ctl("pull", "demo/chat", "--json"))["stale"] is True
    assert document(ctl("load", "demo/chat", "--json"))["stale"] is True


def test_resolve_of_a_folder(ctl: Ctl, tmp_path: Path) -> None:
    result = document(ctl("resolve", str(tmp_path), "--json"))

    assert (result["kind"], result["path"]) == ("local", str(tmp_path))


def test_ls_tells_of_versions_orphans_downloads_and_the_limit(
    ctl: Ctl, daemon: FakeDaemon, client: Client
) -> None:
    daemon.cache.superseded = {"demo/chat"}
    daemon.cache.orphans = {"left-over": 5_000_000}
    daemon.cache.max_bytes = 300_000_000_000
    client.load("demo/chat")
    with client.cache.start_download("demo/stalled") as operation:
        next(operation)
        listing = ctl("ls")
        downloads = document(ctl("ls", "--json"))["downloads"]

    heading, *rows = listing.stdout.splitlines()
    assert re.split(r"\s{2,}", heading.strip()) == [
        *("REPOSITORY", "REFS", "COMMIT", "SIZE", "UNIQUE", "STATE", "LAST USED", "IN USE BY")
    ]
    newest, old = (row for row in rows if row.startswith("demo/chat"))
    assert newest.split()[:7] == [
        *("demo/chat", "main", commit_of("demo/chat")[:12], "40.0", "MB", "38.0", "MB")
    ]
    assert newest.split()[-1] == "m-1"
    assert old.split()[1:3] == ["-", old_commit_of("demo/chat")[:12]]
    assert old.split()[-2:] == ["ago", "-"]
    assert rows[-2] == "downloading demo/stalled: 0 B of 40.0 MB, 1 call waiting"
    assert rows[-1] == (
        "5 snapshots, 198.0 MB on disk, 5.0 MB in unfinished and left-over files, 50.0 GB free, "
        "limit 300.0 GB"
    )
    assert [(each["model"], each["waiters"]) for each in downloads] == [("demo/stalled", 1)]


def test_ls_of_an_empty_cache(ctl: Ctl, daemon: FakeDaemon) -> None:
    daemon.cache.cached = set()

    listing = ctl("ls")

    assert listing.stdout == "0 snapshots, 0 B on disk, 50.0 GB free\n"
    assert "loaderctl pull" in listing.stderr


def test_a_dry_run_of_pull_tells_what_would_be_fetched(ctl: Ctl, daemon: FakeDaemon) -> None:
    daemon.cache.orphans = {"demo/remote": 9_000_000}

    shown = ctl("pull", "demo/remote", "--dry-run")

    assert lines(shown.stdout)[2:] == [
        ["download", "31.0", "MB", "of", "40.0", "MB"],
        ["tokenizer.json", "2.0", "MB"],
        [WEIGHTS, "38.0", "MB,", "of", "which", "9.0", "MB", "are", "there"],
        ["skipped", "2", "files,", "38.0", "MB"],
        ["pytorch_model.bin", "38.0", "MB,", "pickle"],
        ["README.md", "3.0", "kB,", "not", "needed"],
    ]
    assert daemon.last("ResolveModel").request.refresh
    plan = document(ctl("pull", "demo/remote", "--dry-run", "--json"))
    assert (plan["kind"], plan["missing_bytes"]) == ("download", TOTAL - 9_000_000 - 700)
    assert [file["reason"] for file in plan["skipped"]] == ["pickle", "not_needed"]
    assert "DownloadModel" not in {call.method for call in daemon.calls}


def test_a_long_list_of_skipped_files_is_cut(
    ctl: Ctl, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = daemon.cache.plan("demo/remote")
    plan.skipped.extend([plan.skipped[0]] * 20)
    plan.skipped_count = 2000
    monkeypatch.setattr(daemon.cache, "plan", lambda _: plan)

    shown = ctl("pull", "demo/remote", "--dry-run").stdout.splitlines()

    assert shown[-1].split() == ["...", "and", "1990", "more"]
    assert sum("pytorch_model.bin" in line for line in shown) == 9


def test_resolve_asks_the_hub_only_when_told(ctl: Ctl, daemon: FakeDaemon) -> None:
    daemon.cache.hub_answers = False

    ctl("resolve", "demo/chat")
    assert not daemon.last("ResolveModel").request.refresh
    refreshed = ctl("resolve", "demo/chat", "--refresh")

    assert lines(refreshed.stdout)[1] == ["commit", commit_of("demo/chat")]
    assert "may be out of date" in refreshed.stderr
    assert ctl("resolve", "demo/remote").exit_code == ExitCode.UNAVAILABLE


def test_pull_says_what_it_went_on_from(ctl: Ctl, daemon: FakeDaemon) -> None:
    daemon.cache.orphans = {"demo/remote": 9_000_000}

    pulled = ctl("pull", "demo/remote")

    assert pulled.stderr.splitlines()[-1] == (
        "loaderctl: went on from 9.0 MB that were there already"
    )
    assert daemon.cache.orphans == {}


def test_pull_says_what_was_fetched_again(
    ctl: Ctl, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = cache_pb2.DownloadProgress(total_bytes=TOTAL, refetched_bytes=2_000_000)
    monkeypatch.setattr("tests.fake_daemon.downloads.Download.progress", progress)

    pulled = ctl("pull", "demo/remote")

    assert "loaderctl: 2.0 MB were fetched again: the hub did not go on" in pulled.stderr


def test_pull_stops_the_download_of_others(ctl: Ctl, daemon: FakeDaemon, client: Client) -> None:
    none = ctl("pull", "demo/stalled", "--cancel")
    assert (none.exit_code, none.stdout) == (ExitCode.OK, "")
    assert none.stderr == "loaderctl: there is no download of demo/stalled\n"
    assert document(ctl("pull", "demo/stalled", "--cancel", "--json"))["waiters"] == 0

    operation = client.cache.start_download("demo/stalled")
    next(operation)
    stopped = ctl("pull", "demo/stalled", "--cancel")

    assert stopped.stdout == (
        "stopped the download of demo/stalled, which 1 call waited for; "
        "0 B of unfinished files are kept\n"
    )
    with pytest.raises(errors.DownloadCancelledError):
        operation.result()


def test_a_pull_that_is_stopped_says_so(ctl: Ctl, daemon: FakeDaemon, client: Client) -> None:
    def stop() -> None:
        daemon.last("DownloadModel")
        while not client.cache.cancel_download("demo/stalled").waiters:
            pass

    stopper = threading.Thread(target=stop)
    stopper.start()

    stopped = ctl("pull", "demo/stalled")

    stopper.join()
    assert stopped.exit_code == ExitCode.FAILED
    assert "download cancelled: model demo/stalled" in stopped.stderr


def test_pull_does_one_thing_at_a_time(ctl: Ctl, daemon: FakeDaemon) -> None:
    assert ctl("pull", "demo/chat", "--dry-run", "--cancel").exit_code == ExitCode.USAGE
    assert daemon.calls == []
