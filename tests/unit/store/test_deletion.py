"""Deleting snapshots: what is planned, what is on disk afterwards."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from huggingface_hub import scan_cache_dir

from loaderd.server.errors import CacheNotWritableError
from loaderd.server.store import records
from loaderd.server.store.deletion import (
    PrunePolicy,
    plan_deletion,
    plan_prune,
    remove_trash,
)
from loaderd.server.store.scan import Orphan
from tests.unit.store.caches import (
    COMMIT,
    OTHER_COMMIT,
    SMALL_MODEL,
    MadeUpRepo,
    made_up_repo,
    move_to_shared_store,
    scan,
)
from tests.unit.store.deletions import (
    NOW,
    commits,
    execute,
    idle,
    nobody,
    on_disk,
    plan,
    prune,
    used,
)

UPDATED = {**SMALL_MODEL, "config.json": b'{"model_type": "mistral"}'}
PARTIAL = f"{'1' * 64}.incomplete"


@pytest.fixture
def repo(tmp_path: Path) -> MadeUpRepo:
    """A repository of two snapshots that share all but one file."""
    repo = made_up_repo(tmp_path)
    repo.add(SMALL_MODEL, refs=("v1",), listing=SMALL_MODEL)
    repo.add(UPDATED, commit=OTHER_COMMIT, refs=("main", "pr/2"))
    return repo


@pytest.fixture
def cache(repo: MadeUpRepo) -> Path:
    return repo.folder.cache_dir


def size(files: dict[str, bytes]) -> int:
    return sum(map(len, files.values()))


def test_only_what_no_other_snapshot_shares_is_freed(repo: MadeUpRepo, cache: Path) -> None:
    records.note_used(repo.folder, COMMIT, NOW)
    before = on_disk(cache)
    deletion = plan(cache, COMMIT)
    assert commits(deletion.snapshots) == {COMMIT}
    assert deletion.freed_bytes == len(SMALL_MODEL["config.json"])
    assert deletion.remaining_bytes == before - deletion.freed_bytes == size(UPDATED)
    execute(deletion, cache)
    assert before - on_disk(cache) == deletion.freed_bytes
    (left,) = scan(cache).snapshots
    assert (left.commit, left.complete, left.refs) == (OTHER_COMMIT, True, ("main", "pr/2"))
    assert repo.folder.refs() == {OTHER_COMMIT: ["main", "pr/2"]}
    assert repo.folder.read_tree(COMMIT) is None
    assert records.last_used(repo.folder) == {}
    assert scan(cache).orphans == ()
    assert scan_cache_dir(cache).warnings == []


def test_a_repository_without_snapshots_vanishes_whole(repo: MadeUpRepo, cache: Path) -> None:
    records.note_used(repo.folder, COMMIT, NOW)
    (repo.folder.blobs / PARTIAL).write_bytes(b"1234567")
    (repo.folder.path / ".no_exist" / COMMIT).mkdir(parents=True)
    before = on_disk(cache)
    deletion = plan(cache, COMMIT, OTHER_COMMIT)
    assert [orphan.path.name for orphan in deletion.orphans] == [PARTIAL]
    assert (deletion.freed_bytes, deletion.remaining_bytes) == (before, 0)
    execute(deletion, cache)
    assert [path.name for path in cache.iterdir()] == [".locks"]
    execute(deletion, cache)  # what is gone already is no error
    assert [path.name for path in cache.iterdir()] == [".locks"]


def test_what_is_in_use_is_kept(cache: Path) -> None:
    deletion = plan(cache, COMMIT, OTHER_COMMIT, holders=used(OTHER_COMMIT))
    assert commits(deletion.snapshots) == {COMMIT}
    assert commits(deletion.kept) == {OTHER_COMMIT}
    execute(deletion, cache)
    assert commits(scan(cache).snapshots) == {OTHER_COMMIT}


def test_a_damaged_repository_can_be_deleted(repo: MadeUpRepo, cache: Path) -> None:
    repo.blob("model.safetensors").unlink()
    repo.folder.write_ref("gone", "f" * 40)
    execute(plan(cache, COMMIT, OTHER_COMMIT), cache)
    assert not repo.folder.path.exists()


def test_contents_that_repositories_share_stay(repo: MadeUpRepo, cache: Path) -> None:
    shared = move_to_shared_store(repo.blob("model.safetensors"), cache)
    before = on_disk(cache)
    deletion = plan(cache, COMMIT, OTHER_COMMIT)
    execute(deletion, cache)
    assert before - on_disk(cache) == deletion.freed_bytes > 0
    assert shared.is_file()
    assert not repo.folder.path.exists()


def test_a_content_that_somebody_links_just_now_stays(
    repo: MadeUpRepo, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blob = repo.blob("config.json")
    deletion = plan(cache, COMMIT, OTHER_COMMIT)
    repo.folder.locks.mkdir(parents=True)
    with FileLock(repo.folder.locks / f"{blob.name}.lock"):
        execute(deletion, cache)
    assert [path.name for path in repo.folder.blobs.iterdir()] == [blob.name]
    assert "1 contents of org/model stay, locked by others" in caplog.text
    assert scan(cache).snapshots == ()
    assert prune(cache, PrunePolicy(orphans=True)).freed_bytes == len(SMALL_MODEL["config.json"])


def test_a_content_that_was_linked_since_the_plan_stays(repo: MadeUpRepo, cache: Path) -> None:
    deletion = plan(cache, COMMIT, OTHER_COMMIT)
    repo.add(SMALL_MODEL, commit="c" * 40)
    execute(deletion, cache)
    (left,) = scan(cache).snapshots
    assert (left.commit, left.complete) == ("c" * 40, True)


def test_a_deletion_that_was_cut_off_is_ended(
    repo: MadeUpRepo, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deletion = plan(cache, COMMIT)
    monkeypatch.setattr("loaderd.server.store.deletion._linked", _crash)
    with pytest.raises(KeyboardInterrupt):
        execute(deletion, cache)
    monkeypatch.undo()
    assert commits(scan(cache).snapshots) == {OTHER_COMMIT}
    remove_trash(repo.folder)
    assert scan(cache).orphans == ()
    assert scan(cache).snapshots[0].complete
    assert {path.name for path in repo.folder.path.iterdir()} == {
        *("blobs", "refs", "snapshots", "trees")
    }


def test_what_came_back_since_is_not_trash(
    repo: MadeUpRepo, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deletion = plan(cache, COMMIT)
    monkeypatch.setattr("loaderd.server.store.deletion._linked", _crash)
    with pytest.raises(KeyboardInterrupt):
        execute(deletion, cache)
    monkeypatch.undo()
    repo.add(SMALL_MODEL, refs=("v1",))
    remove_trash(repo.folder)
    back = next(info for info in scan(cache).snapshots if info.commit == COMMIT)
    assert (back.complete, back.refs) == (True, ("v1",))


def test_a_cache_that_cannot_be_written_to_is_told(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, target: Path) -> None:
        raise OSError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "rename", refuse)  # the tests may run as root
    with pytest.raises(CacheNotWritableError, match="Permission denied"):
        execute(plan(cache, COMMIT), cache)
    assert len(scan(cache).snapshots) == 2


def test_prune_without_a_condition_does_nothing(cache: Path) -> None:
    deletion = prune(cache, PrunePolicy())
    assert (deletion.snapshots, deletion.orphans, deletion.freed_bytes) == ((), (), 0)


def test_prune_orphans_leaves_what_is_being_written(repo: MadeUpRepo, cache: Path) -> None:
    left_over, running = repo.folder.blobs / ("2" * 64), repo.folder.blobs / PARTIAL
    left_over.write_bytes(b"12345")
    running.write_bytes(b"1234567")
    repo.folder.locks.mkdir(parents=True)
    with FileLock(repo.folder.locks / f"{'1' * 64}.lock"):
        deletion = prune(cache, PrunePolicy(orphans=True))
        assert deletion.freed_bytes == 5
        assert prune(cache, PrunePolicy(orphans=True), busy=lambda _: True).orphans == ()
        execute(deletion, cache)
    assert (left_over.exists(), running.exists()) == (False, True)
    assert len(scan(cache).snapshots) == 2
    execute(prune(cache, PrunePolicy(orphans=True)), cache)
    assert scan(cache).orphans == ()


def test_prune_by_reference_and_by_age(repo: MadeUpRepo, cache: Path) -> None:
    repo.add({**SMALL_MODEL, "a.json": b"1"}, commit="c" * 40, refs=())
    recent = datetime.now(UTC) + timedelta(days=100)
    records.note_used(repo.folder, OTHER_COMMIT, recent)
    unreferenced = prune(cache, PrunePolicy(unreferenced=True))
    assert commits(unreferenced.snapshots) == {"c" * 40}
    policy = PrunePolicy(unused_for=timedelta(days=30))
    old = prune(cache, policy, now=recent + timedelta(days=1))
    assert commits(old.snapshots) == {COMMIT, "c" * 40}
    kept = prune(cache, policy, used(COMMIT), recent + timedelta(days=1))
    assert (commits(kept.snapshots), commits(kept.kept)) == ({"c" * 40}, {COMMIT})


def test_prune_to_a_size_takes_orphans_first(repo: MadeUpRepo, cache: Path) -> None:
    (repo.folder.blobs / PARTIAL).write_bytes(b"1234567")
    total = scan(cache).total_bytes
    deletion = prune(cache, PrunePolicy(max_bytes=total))
    assert (deletion.snapshots, deletion.freed_bytes) == ((), 7)
    assert prune(cache, PrunePolicy(max_bytes=total + 7)).freed_bytes == 0


def test_prune_to_a_size_that_is_out_of_reach_names_who_is_in_use(cache: Path) -> None:
    deletion = prune(cache, PrunePolicy(max_bytes=0), used(COMMIT))
    assert (commits(deletion.snapshots), commits(deletion.kept)) == ({OTHER_COMMIT}, {COMMIT})
    assert deletion.remaining_bytes == size(SMALL_MODEL)


def test_a_disk_without_room_for_a_lock_gets_room(
    repo: MadeUpRepo, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deletion = plan(cache, COMMIT, OTHER_COMMIT)
    make = Path.mkdir

    def refuse(path: Path, *arguments: Any, **more: Any) -> None:
        if ".locks" in path.parts and list(repo.folder.path.glob("*/*/config.json")):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        if ".locks" in path.parts and list(repo.folder.path.glob("trash-*")):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        make(path, *arguments, **more)

    monkeypatch.setattr(Path, "mkdir", refuse)
    execute(deletion, cache)
    assert not repo.folder.path.exists()


def test_what_frees_nothing_is_not_taken_for_its_size(repo: MadeUpRepo, cache: Path) -> None:
    repo.add(SMALL_MODEL, commit="c" * 40, refs=())
    deletion = prune(cache, PrunePolicy(max_bytes=0), used(OTHER_COMMIT))
    # Each of the two has a file that goes only with both.
    assert commits(deletion.snapshots) == {COMMIT, "c" * 40}
    assert deletion.freed_bytes == len(SMALL_MODEL["config.json"])
    deletion = prune(cache, PrunePolicy(max_bytes=0), used(OTHER_COMMIT, COMMIT))
    assert (commits(deletion.snapshots), deletion.freed_bytes) == (set(), 0)
    assert commits(deletion.kept) == {COMMIT, OTHER_COMMIT}


def test_a_repository_that_is_downloaded_keeps_its_left_overs(
    repo: MadeUpRepo, cache: Path
) -> None:
    (repo.folder.blobs / PARTIAL).write_bytes(b"1234567")
    deletion = plan(cache, COMMIT, OTHER_COMMIT, busy=lambda repo_id: repo_id == "org/model")
    assert deletion.orphans == ()
    execute(deletion, cache, busy=lambda repo_id: repo_id == "org/model")
    assert [path.name for path in repo.folder.blobs.iterdir()] == [PARTIAL]


class Counted(tuple[Orphan, ...]):
    """Orphans that are counted whenever they are looked at."""

    looks = 0

    def __iter__(self) -> Iterator[Orphan]:
        for orphan in super().__iter__():
            Counted.looks += 1
            yield orphan


def test_many_repositories_with_left_overs_are_looked_through_few_times(cache: Path) -> None:
    for number in range(30):
        repo = made_up_repo(cache, f"org/r{number}")
        repo.add(SMALL_MODEL)
        (repo.folder.blobs / PARTIAL).write_bytes(b"1234567")
    contents = scan(cache)
    counted = replace(contents, orphans=Counted(contents.orphans))
    plan_prune(counted, PrunePolicy(max_bytes=0), nobody, NOW, idle)
    plan_deletion(counted, contents.snapshots, nobody, idle)
    assert Counted.looks <= 10 * len(contents.orphans)


def _crash(folder: Path) -> None:
    raise KeyboardInterrupt
