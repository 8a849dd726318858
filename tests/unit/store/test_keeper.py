"""What is in use stays: in this daemon, in others, in programs that download."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from loaderd.server.errors import CacheLimitError, SnapshotInUseError, SnapshotNotFoundError
from loaderd.server.store import deletion
from loaderd.server.store.deletion import Deletion, PrunePolicy
from loaderd.server.store.keeper import Keeper, Target
from loaderd.server.store.locks import is_locked
from loaderd.server.store.plan import DownloadPlan, PlannedFile
from tests.unit.store.caches import (
    COMMIT,
    OTHER_COMMIT,
    SMALL_MODEL,
    MadeUpRepo,
    entry,
    made_up_repo,
    safetensors,
    scan,
)

NEW_COMMIT = "c" * 40
MODEL = [Target("org/model")]
ALL = PrunePolicy(max_bytes=0)
UPDATED = {name: content + b" " for name, content in SMALL_MODEL.items()}
UPDATED["model.safetensors"] = safetensors(fill=b"\2")


@pytest.fixture
def repo(tmp_path: Path) -> MadeUpRepo:
    repo = made_up_repo(tmp_path)
    repo.add(SMALL_MODEL)
    return repo


@pytest.fixture
def cache(repo: MadeUpRepo) -> Path:
    return repo.folder.cache_dir


def size(files: dict[str, bytes]) -> int:
    return sum(map(len, files.values()))


def planned(files: dict[str, bytes], commit: str = NEW_COMMIT) -> DownloadPlan:
    """The plan of a download that brings all of it."""
    wanted = [
        PlannedFile(name, len(content), entry(name, content).digest, cached=False)
        for name, content in files.items()
    ]
    return DownloadPlan("org/model", "main", commit, tuple(wanted))


async def test_what_another_daemon_uses_is_not_deleted(cache: Path) -> None:
    ours, theirs = Keeper(cache, None), Keeper(cache, None)
    pins = [await theirs.hold("org/model", COMMIT, holder) for holder in ("m:1", "m:2")]
    (info,) = (await ours.contents()).snapshots
    for _ in pins:
        with pytest.raises(SnapshotInUseError) as caught:
            await ours.delete(MODEL, dry_run=False)
        assert caught.value.holders == "another process"
        pruned = await ours.prune(ALL, dry_run=False)
        assert (pruned.snapshots, pruned.kept) == ((), (info,))
        assert pruned.holders == {info.path: ("another process",)}
        pins.pop().release()
    with pytest.raises(SnapshotInUseError):
        await ours.delete(MODEL, dry_run=False)
    pins.pop().release()
    assert (await ours.delete(MODEL, dry_run=False)).freed_bytes == size(SMALL_MODEL)


async def test_a_snapshot_that_is_gone_is_not_held(cache: Path, repo: MadeUpRepo) -> None:
    keeper = Keeper(cache, None)
    with pytest.raises(SnapshotNotFoundError):
        await keeper.hold("org/model", OTHER_COMMIT, "m:1")
    assert not is_locked(repo.folder.pin(OTHER_COMMIT))


async def test_what_another_daemon_has_begun_to_use_since_the_plan_stays(cache: Path) -> None:
    plan = await Keeper(cache, None).delete(MODEL, dry_run=True)
    pin = await Keeper(cache, None).hold("org/model", COMMIT, "m:1")
    deletion.execute(plan, cache, lambda _: False)
    (left,) = scan(cache).snapshots
    assert (left.complete, left.refs) == (True, ("main",))
    pin.release()


async def test_what_another_program_downloads_is_not_deleted(cache: Path, repo: MadeUpRepo) -> None:
    made_up_repo(cache, "org/other").add(SMALL_MODEL)
    keeper = Keeper(cache, None)
    repo.folder.locks.mkdir(parents=True)
    with FileLock(repo.folder.lock("1" * 64)):
        with pytest.raises(SnapshotInUseError, match="another process"):
            await keeper.delete(MODEL, dry_run=False)
        pruned = await keeper.prune(ALL, dry_run=False)
        assert [info.repo_id for info in pruned.snapshots] == ["org/other"]
        assert [info.repo_id for info in pruned.kept] == ["org/model"]
    await keeper.delete(MODEL, dry_run=False)
    assert scan(cache).snapshots == ()


async def test_where_locks_do_not_work_a_daemon_sees_its_own_use(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(handle: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    keeper = Keeper(cache, None)
    with caplog.at_level(logging.WARNING):
        pins = [await keeper.hold("org/model", COMMIT, holder) for holder in ("m:1", "m:2")]
    assert [record.message for record in caplog.records] == [
        "other processes cannot tell which snapshots are used: [Errno 37] No locks available"
    ]
    with pytest.raises(SnapshotInUseError, match="m:1, m:2"):
        await keeper.delete(MODEL, dry_run=False)
    for pin in pins:
        pin.release()
    await keeper.delete(MODEL, dry_run=False)
    assert scan(cache).snapshots == ()


async def test_an_update_under_the_limit_takes_the_place_of_the_old_version(cache: Path) -> None:
    limit = size(SMALL_MODEL) * 3 // 2
    keeper = Keeper(cache, limit)
    pin = await keeper.hold("org/model", COMMIT, "m:1")
    async with keeper.arriving("org/model") as arrival:
        with pytest.raises(CacheLimitError):
            await keeper.make_room(arrival, planned(UPDATED))
    pin.release()
    async with keeper.arriving("org/model") as arrival:
        await keeper.make_room(arrival, planned(UPDATED))
        assert scan(cache).snapshots == ()
        assert made_up_repo(cache).folder.blobs.is_dir(), "the download goes on in it"


async def test_a_download_holds_what_it_shares_and_nothing_else(
    cache: Path, repo: MadeUpRepo
) -> None:
    repo.add(UPDATED, commit=OTHER_COMMIT, refs=())
    keeper = Keeper(cache, None)
    old, other = sorted(scan(cache).snapshots, key=lambda info: info.commit)
    async with keeper.arriving("org/model") as arrival:
        assert [keeper.holders(info) for info in (old, other)] == [("download",), ("download",)]
        shared = {"config.json": SMALL_MODEL["config.json"]}
        await keeper.make_room(arrival, planned({**shared, "new.json": b"{}"}))
        assert [keeper.holders(info) for info in (old, other)] == [("download",), ()]
        # The download's own locks are not somebody else's.
        repo.folder.locks.mkdir(parents=True)
        with FileLock(repo.folder.lock(entry("new.json", b"{}").digest)):
            deleted = await keeper.delete([Target("org/model", OTHER_COMMIT)], dry_run=False)
        assert deleted.snapshots == (other,)
    async with keeper.arriving("org/model") as arrival:
        await keeper.make_room(arrival, planned({}, COMMIT))
        assert keeper.holders(old) == ("download",), "it is what is being completed"


async def test_what_a_download_goes_on_from_stays_with_its_repository(
    cache: Path, repo: MadeUpRepo
) -> None:
    partial = repo.folder.blobs / f"{entry('new.json', b'[1]').digest}.incomplete"
    partial.write_bytes(b"[")
    keeper = Keeper(cache, None)
    async with keeper.arriving("org/model") as arrival:
        await keeper.make_room(arrival, planned({"new.json": b"[1]"}))
        await keeper.delete(MODEL, dry_run=False)
        assert partial.read_bytes() == b"["
    assert scan(cache).snapshots == ()


@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("plan_prune", lambda keeper: keeper.prune(ALL, dry_run=True)),
        ("plan_deletion", lambda keeper: keeper.delete(MODEL, dry_run=True)),
    ],
)
async def test_deletions_are_planned_beside_the_event_loop(
    cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, work: Callable[[Keeper], object]
) -> None:
    plan: Callable[..., Deletion] = getattr(deletion, name)
    threads: list[threading.Thread] = []

    def planning(*arguments: object) -> Deletion:
        threads.append(threading.current_thread())
        return plan(*arguments)

    monkeypatch.setattr(deletion, name, planning)
    await work(Keeper(cache, None))  # type: ignore[misc]
    assert threads
    assert threading.main_thread() not in threads
