"""The cache through the daemon: pins, deletion, pruning, the limit, cancelled downloads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import pytest

from loaderd.client import Client, DownloadPlan, DownloadProgress, Snapshot, errors
from tests.daemon import SpawnedDaemon
from tests.hub import Hub, faults
from tests.integration.cache.small import WEIGHTS_BYTES, small_repo
from tests.waiting import until

Spawn = Callable[..., SpawnedDaemon]


def disk_bytes(daemon: SpawnedDaemon) -> int:
    """The bytes of all blobs in the cache."""
    blobs = daemon.cache_dir.glob("models--*/blobs/*")
    return sum(blob.lstat().st_size for blob in blobs)


def names(snapshots: Iterable[Snapshot]) -> list[str]:
    """The repositories of snapshots, in their order."""
    return [snapshot.repo_id for snapshot in snapshots]


def test_what_a_model_uses_is_not_deleted(daemon: SpawnedDaemon, client: Client) -> None:
    model = client.load("org/tiny")
    client.cache.download("org/tiny@next")
    used, other = (client.cache.resolve(name) for name in ("org/tiny", "org/tiny@next"))
    assert isinstance(used, Snapshot)
    assert isinstance(other, Snapshot)
    assert (used.in_use_by, other.in_use_by) == ((model.id,), ())

    plan = client.cache.plan_delete("org/tiny")
    assert [kept.commit for kept in plan.kept] == [used.commit]
    with pytest.raises(errors.SnapshotInUseError) as caught:
        plan.execute()
    assert caught.value.holders == model.id
    assert len(client.cache.snapshots()) == 2, "all or nothing"
    assert model.generate("The sky", max_new_tokens=2, ignore_eos=True).text

    # Pruning takes the other, and says what it left.
    pruned = client.cache.prune(max_bytes=0)
    assert [snapshot.commit for snapshot in pruned.snapshots] == [other.commit]
    assert [snapshot.commit for snapshot in pruned.kept] == [used.commit]

    model.unload()
    assert client.cache.plan_delete("org/tiny").execute().freed_bytes > 0
    assert len(client.cache.snapshots()) == 0
    assert disk_bytes(daemon) == 0
    # It is not gone for good.
    assert client.load("org/tiny").info.state.name == "READY"


def test_a_deletion_frees_what_its_plan_says(daemon: SpawnedDaemon, client: Client) -> None:
    for name in ("org/tiny", "org/tiny@next", "org/a"):
        client.cache.download(name)
    listed = {(each.repo_id, each.refs): each for each in client.cache.snapshots()}
    main, branch = listed["org/tiny", ("main",)], listed["org/tiny", ("next",)]
    assert 0 < main.unique_bytes < main.size_bytes, "the versions share their tokenizer"

    before = disk_bytes(daemon)
    plan = client.cache.plan_delete(f"org/tiny@{main.commit[:12]}")
    assert [each.commit for each in plan.snapshots] == [main.commit]
    assert plan.freed_bytes == main.unique_bytes
    assert len(client.cache.snapshots()) == 3, "a plan deletes nothing"
    done = plan.execute()
    assert done.freed_bytes == before - disk_bytes(daemon) == plan.freed_bytes
    assert done.remaining_bytes == disk_bytes(daemon) == client.cache.snapshots().total_bytes
    left = client.cache.resolve("org/tiny@next")
    assert isinstance(left, Snapshot)
    assert left.commit == branch.commit
    assert client.cache.verify("org/tiny@next").ok

    with pytest.raises(errors.SnapshotNotFoundError):
        client.cache.plan_delete("org/tiny@main")
    with pytest.raises(errors.SnapshotNotFoundError):
        client.cache.plan_delete("org/a", "org/none")
    assert client.cache.delete("org/tiny", "org/a").remaining_bytes == 0
    assert [path.name for path in daemon.cache_dir.glob("models--*")] == []


def test_pruning_by_reference_and_use(hub: Hub, daemon: SpawnedDaemon, client: Client) -> None:
    first = client.cache.download("org/tiny")
    second = client.cache.download("org/tiny@next")
    client.cache.download("org/a")
    with pytest.raises(errors.InvalidArgumentError):
        client.cache.prune()
    # Nothing points to the first commit any more once the branch has moved.
    (daemon.cache_dir / "models--org--tiny/refs/main").write_text(second.commit)
    pruned = client.cache.prune(unreferenced=True, dry_run=True)
    assert [each.commit for each in pruned.snapshots] == [first.commit]
    assert len(client.cache.snapshots()) == 3
    assert client.cache.prune(unreferenced=True).freed_bytes == pruned.freed_bytes
    assert len(client.cache.snapshots()) == 2
    assert client.cache.prune(unused_for=timedelta(days=1)).snapshots == ()
    assert len(client.cache.prune(unused_for=timedelta(0)).snapshots) == 2
    assert disk_bytes(daemon) == 0


def test_the_limit_evicts_what_was_not_used_for_longest(hub: Hub, spawn: Spawn) -> None:
    limit = 2 * WEIGHTS_BYTES + WEIGHTS_BYTES // 2
    daemon = spawn("--standby", "0", "--cache-max-bytes", str(limit), HF_ENDPOINT=hub.url)
    with Client(daemon.address) as client:
        assert client.cache.snapshots().max_bytes == limit
        client.cache.download("org/a")
        client.cache.download("org/b")
        client.cache.download("org/a")  # used again: `b` is now the one not used for longest
        client.cache.download("org/c")
        assert names(client.cache.snapshots()) == ["org/a", "org/c"]
        assert disk_bytes(daemon) <= limit


def test_the_limit_never_evicts_what_is_in_use(hub: Hub, spawn: Spawn) -> None:
    tiny = WEIGHTS_BYTES
    daemon = spawn("--standby", "0", "--cache-max-bytes", str(tiny), HF_ENDPOINT=hub.url)
    with Client(daemon.address) as client:
        model = client.load("org/tiny")
        with pytest.raises(errors.CacheLimitError) as caught:
            client.cache.download("org/a")
        assert caught.value.max_bytes == tiny
        assert caught.value.needed_bytes is not None
        assert caught.value.needed_bytes > WEIGHTS_BYTES
        assert names(client.cache.snapshots()) == ["org/tiny"]
        assert model.generate("The sky", max_new_tokens=2, ignore_eos=True).text
        assert not list(daemon.cache_dir.glob("models--org--a/blobs/*")), "nothing was fetched"


def test_a_cancelled_download_ends_for_all_and_the_next_one_goes_on(
    hub: Hub, daemon: SpawnedDaemon, client: Client
) -> None:
    hub.inject(faults.hang(after_bytes=WEIGHTS_BYTES // 2), path="*/model.safetensors")
    ended: list[str] = []

    def wait() -> None:
        with Client(daemon.address) as own:
            try:
                own.cache.download("org/a")
            except errors.DownloadCancelledError as error:
                ended.append(error.model or "")

    waiters = [threading.Thread(target=wait) for _ in range(2)]
    for waiter in waiters:
        waiter.start()

    def under_way() -> bool:
        downloads = client.cache.snapshots().downloads
        return any(
            each.waiters == 2 and each.progress.downloaded_bytes > WEIGHTS_BYTES // 3
            for each in downloads
        )

    until(under_way)
    with pytest.raises(errors.SnapshotInUseError):
        client.cache.delete("org/a")
    cancelled = client.cache.cancel_download("org/a")
    for waiter in waiters:
        waiter.join(20)
    assert ended == ["org/a", "org/a"]
    assert cancelled.waiters == 2
    assert cancelled.kept_bytes > WEIGHTS_BYTES // 3
    assert client.cache.snapshots().orphan_bytes == cancelled.kept_bytes
    assert client.cache.cancel_download("org/a").waiters == 0

    hub.heal()
    plan = client.cache.resolve("org/a")
    assert isinstance(plan, DownloadPlan)
    assert plan.total_bytes - plan.missing_bytes >= cancelled.kept_bytes
    seen: list[DownloadProgress] = []
    assert client.cache.download("org/a", on_progress=seen.append).complete
    assert seen[-1].resumed_bytes == cancelled.kept_bytes
    asked = [each.range for each in hub.requests if each.range]
    assert asked == [f"bytes={cancelled.kept_bytes}-"]
    assert client.cache.snapshots().orphan_bytes == 0


def test_orphans_are_counted_and_pruned(hub: Hub, daemon: SpawnedDaemon, client: Client) -> None:
    hub.inject(faults.hang(after_bytes=WEIGHTS_BYTES // 2), path="*/model.safetensors")
    operation = client.cache.start_download("org/a")
    for progress in operation:
        if progress.downloaded_bytes > WEIGHTS_BYTES // 3:
            break
    assert client.cache.prune(orphans=True).orphan_files == 0, "a download writes it"
    operation.cancel()
    until(lambda: client.cache.prune(orphans=True, dry_run=True).orphan_files > 0)
    orphans = client.cache.snapshots().orphan_bytes
    pruned = client.cache.prune(orphans=True)
    assert pruned.freed_bytes == orphans > WEIGHTS_BYTES // 3
    assert client.cache.snapshots().orphan_bytes == 0


def test_resolving_anew_sees_what_the_hub_has_now(hub: Hub, client: Client) -> None:
    client.cache.download("org/a")
    current = client.cache.resolve("org/a", refresh=True)
    assert isinstance(current, Snapshot)
    assert not current.stale

    hub.add(small_repo("org/a", b"new"))
    old = client.cache.resolve("org/a")
    assert isinstance(old, Snapshot)
    plan = client.cache.resolve("org/a", refresh=True)
    assert isinstance(plan, DownloadPlan)
    assert plan.commit != old.commit
    assert {file.path for file in plan.files if not file.cached} == {"model.safetensors"}

    hub.stop()
    stale = client.cache.resolve("org/a", refresh=True)
    assert isinstance(stale, Snapshot)
    assert (stale.stale, stale.commit) == (True, old.commit)
    by_commit = client.cache.resolve(f"org/a@{old.commit}", refresh=True)
    assert isinstance(by_commit, Snapshot)
    assert not by_commit.stale, "a commit is what it is"


def test_the_last_good_version_is_served_when_another_programs_update_failed(
    hub: Hub, daemon: SpawnedDaemon, client: Client
) -> None:
    good = client.cache.download("org/tiny")
    # What a program does that moves the ref first and then does not get the files.
    repo = daemon.cache_dir / "models--org--tiny"
    half = repo / "snapshots" / ("e" * 40)
    half.mkdir()
    (half / "config.json").symlink_to((Path(good.path) / "config.json").readlink())
    (repo / "refs/main").write_text("e" * 40)
    hub.stop()

    served = client.cache.download("org/tiny")
    assert (served.commit, served.stale) == (good.commit, True)
    model = client.load("org/tiny")
    assert (model.info.commit, model.info.stale) == (good.commit, True)
    assert model.generate("The sky", max_new_tokens=2, ignore_eos=True).text


def test_a_cancelled_download_can_be_started_again_at_once(hub: Hub, client: Client) -> None:
    hub.inject(faults.hang(after_bytes=WEIGHTS_BYTES // 2), path="*/model.safetensors")
    operation = client.cache.start_download("org/a")
    for progress in operation:
        if progress.downloaded_bytes > WEIGHTS_BYTES // 3:
            break
    hub.heal()
    assert client.cache.cancel_download("org/a").waiters == 1
    assert client.cache.download("org/a").complete
    with pytest.raises(errors.DownloadCancelledError):
        operation.result()
