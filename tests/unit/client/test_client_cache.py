"""The cache in the SDK: what is asked of the daemon, and what comes of its answers."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from loaderd.client import (
    AsyncClient,
    Client,
    DownloadProgress,
    FileProblem,
    ProblemKind,
    SkipReason,
    Snapshot,
    VerifyProgress,
    VerifyUpdate,
    errors,
)
from loaderd.v1 import cache_pb2
from tests.fake_daemon import FakeDaemon
from tests.fake_daemon.cache import TOTAL, WEIGHTS, commit_of, old_commit_of

CUT = cache_pb2.FileProblem(
    path=WEIGHTS, kind=cache_pb2.PROBLEM_KIND_SIZE, expected="38000000 bytes", found="7 bytes"
)


def test_a_plan_is_executed_by_commit(daemon: FakeDaemon, client: Client) -> None:
    plan = client.cache.plan_delete("demo/chat", "demo/base@main")
    daemon.cache.superseded = {"demo/chat"}  # it came meanwhile, and stays

    deletion = plan.execute()

    assert list(daemon.last("DeleteSnapshots").request.models) == [
        f"demo/chat@{commit_of('demo/chat')}",
        f"demo/base@{commit_of('demo/base')}",
    ]
    assert deletion.freed_bytes == 2 * TOTAL - 2_000_700  # what the other commit shares stays
    (left,) = (each for each in client.cache.snapshots() if each.repo_id == "demo/chat")
    assert left.commit == old_commit_of("demo/chat")


def test_a_plan_whose_snapshots_are_in_use_deletes_none(daemon: FakeDaemon, client: Client) -> None:
    client.load("demo/chat")

    plan = client.cache.plan_delete("demo/base", "demo/chat")

    assert [each.repo_id for each in plan.snapshots] == ["demo/base"]
    assert [(each.repo_id, each.in_use_by) for each in plan.kept] == [("demo/chat", ("m-1",))]
    with pytest.raises(errors.SnapshotInUseError) as refused:
        plan.execute()
    assert refused.value.holders == "m-1"
    assert {"demo/base", "demo/chat"} < daemon.cache.cached


def test_a_plan_shows_what_it_is(client: Client) -> None:
    plan = client.cache.plan_delete("demo/chat")

    assert repr(plan) == (
        f"DeletionPlan(demo/chat@{commit_of('demo/chat')[:12]}; frees {TOTAL} bytes)"
    )


def test_conditions_that_are_not_given_are_not_sent(daemon: FakeDaemon, client: Client) -> None:
    client.cache.prune(orphans=True)
    first = daemon.last("PruneCache").request
    client.cache.prune(unused_for=timedelta(days=30), max_bytes=0, dry_run=True)
    second = daemon.last("PruneCache").request

    assert [field.name for field, _ in first.ListFields()] == ["orphans"]
    assert [field.name for field, _ in second.ListFields()] == [
        *("unused_for", "max_bytes", "dry_run")
    ]
    assert (second.unused_for.ToTimedelta(), second.max_bytes) == (timedelta(days=30), 0)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda c: c.prune(max_bytes=-1), "max_bytes: must be from 0 to 18446744073709551615"),
        (lambda c: c.prune(unused_for=float("inf")), "unused_for: is no time span that"),
        (lambda c: c.plan_delete("a/b", "bad \udcff"), "model: is not valid Unicode text"),
        (lambda c: c.verify("bad \udcff"), "model: is not valid Unicode text"),
        (lambda c: c.cancel_download("bad \udcff"), "model: is not valid Unicode text"),
    ],
)
def test_what_the_wire_cannot_carry_is_refused_at_once(
    daemon: FakeDaemon, client: Client, call: Callable[[Any], object], text: str
) -> None:
    with pytest.raises((errors.InvalidArgumentError, errors.InvalidNameError), match=text):
        call(client.cache)
    assert daemon.calls == []


def test_a_verification_tells_each_thing_as_it_comes(daemon: FakeDaemon, client: Client) -> None:
    daemon.cache.problems = {"demo/chat": [CUT]}
    problem = FileProblem(
        path=WEIGHTS, kind=ProblemKind.SIZE, expected="38000000 bytes", found="7 bytes"
    )
    seen: list[VerifyUpdate] = []

    found = client.cache.verify("demo/chat")
    repaired = client.cache.verify("demo/chat", repair=True, on_progress=seen.append)

    assert (found.ok, found.repaired, found.problems) == (False, False, (problem,))
    assert (repaired.ok, repaired.repaired, repaired.problems) == (True, True, (problem,))
    assert [type(update) for update in seen] == [
        *[VerifyProgress] * 3,
        FileProblem,
        *[DownloadProgress] * 2,
    ]
    assert repaired.verified_files == 2
    assert client.cache.verify("demo/chat").problems == ()


async def test_a_verifications_on_progress_may_be_a_coroutine_function(
    daemon: FakeDaemon,
) -> None:
    seen: list[VerifyUpdate] = []

    async def remember(update: VerifyUpdate) -> None:
        seen.append(update)

    async with AsyncClient(daemon.address) as client:
        await client.cache.verify("demo/chat", on_progress=remember)
    assert len(seen) == 3


def test_a_verification_that_nobody_waits_for_is_cancelled(
    daemon: FakeDaemon, client: Client
) -> None:
    daemon.step_s = 0.2
    with client.cache.start_verify("demo/chat") as operation:
        next(operation)

    assert daemon.last("VerifySnapshot").cancelled.wait(10)
    with pytest.raises(errors.CallCancelledError):
        operation.result()


def test_a_download_has_a_plan_and_goes_on_from_what_is_there(
    daemon: FakeDaemon, client: Client
) -> None:
    daemon.cache.orphans = {"demo/remote": 9_000_000}
    operation = client.cache.start_download("demo/remote")
    assert operation.plan is None

    progress = list(operation)

    plan = operation.plan
    assert plan is not None
    assert plan.missing_bytes == TOTAL - 9_000_000 - 700
    assert {file.path: file.partial_bytes for file in plan.files}[WEIGHTS] == 9_000_000
    assert {file.reason for file in plan.skipped} == {SkipReason.PICKLE, SkipReason.NOT_NEEDED}
    assert {each.resumed_bytes for each in progress} == {9_000_000}
    assert [file.path for file in progress[0].files] == [WEIGHTS]


def test_a_refreshed_resolution_may_be_stale(daemon: FakeDaemon, client: Client) -> None:
    daemon.cache.hub_answers = False

    known = client.cache.resolve("demo/chat")
    asked = client.cache.resolve("demo/chat", refresh=True)

    assert isinstance(known, Snapshot)
    assert isinstance(asked, Snapshot)
    assert (known.stale, asked.stale) == (False, True)
    with pytest.raises(errors.HubUnreachableError):
        client.cache.resolve("demo/remote", refresh=True)


def test_a_load_that_hashes_its_files_first_tells_how_far_it_is(
    daemon: FakeDaemon, client: Client
) -> None:
    daemon.cache.unhashed = {"demo/chat"}

    told = [progress.verification for progress in client.start_load("demo/chat")]

    assert [each and each.verified_files for each in told] == [None, 1, 2, 3, None, None]
