"""Deleting snapshots: what is planned, what is on disk afterwards."""

from __future__ import annotations

import errno
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from huggingface_hub import scan_cache_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from loaderd.server.errors import CacheNotWritableError
from loaderd.server.store import deletion as deletion_module
from loaderd.server.store import records
from loaderd.server.store.deletion import (
    Busy,
    Deletion,
    Holders,
    PrunePolicy,
    plan_deletion,
    plan_prune,
    remove_trash,
)
from loaderd.server.store.scan import CacheContents, SnapshotInfo
from tests.unit.store.caches import (
    COMMIT,
    OTHER_COMMIT,
    SMALL_MODEL,
    MadeUpRepo,
    made_up_repo,
    move_to_shared_store,
    safetensors,
    scan,
)

UPDATED = {**SMALL_MODEL, "config.json": b'{"model_type": "mistral"}'}
NOW = datetime(2030, 1, 1, tzinfo=UTC)
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


def nobody(snapshot: SnapshotInfo) -> tuple[str, ...]:
    return ()


def used(*commits: str) -> Holders:
    """The holders when these commits are used, by a model."""
    return lambda info: ("m:1",) if info.commit in commits else ()


def idle(repo_id: str) -> bool:
    return False


def plan(cache: Path, *commits: str, holders: Holders = nobody, busy: Busy = idle) -> Deletion:
    contents = scan(cache)
    chosen = [info for info in contents.snapshots if info.commit in commits]
    return plan_deletion(contents, chosen, holders, busy)


def prune(
    cache: Path,
    policy: PrunePolicy,
    holders: Holders = nobody,
    now: datetime = NOW,
    busy: Busy = idle,
) -> Deletion:
    return plan_prune(scan(cache), policy, holders, now, busy)


def execute(deletion: Deletion, cache: Path) -> None:
    deletion_module.execute(deletion, cache, idle)


def commits(infos: tuple[SnapshotInfo, ...]) -> set[str]:
    return {info.commit for info in infos}


def size(files: dict[str, bytes]) -> int:
    return sum(map(len, files.values()))


def on_disk(cache: Path) -> int:
    """Bytes of all contents in the repositories and in the store that they share."""
    blobs = [*cache.glob("models--*/blobs/*"), *cache.glob("blobs/*/*")]
    return sum(path.lstat().st_size for path in blobs if not path.is_symlink())


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


def test_a_content_that_somebody_links_just_now_stays(repo: MadeUpRepo, cache: Path) -> None:
    blob = repo.blob("config.json")
    deletion = plan(cache, COMMIT, OTHER_COMMIT)
    repo.folder.locks.mkdir(parents=True)
    with FileLock(repo.folder.locks / f"{blob.name}.lock"):
        execute(deletion, cache)
    assert [path.name for path in repo.folder.blobs.iterdir()] == [blob.name]
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


def _crash(folder: Path) -> None:
    raise KeyboardInterrupt


FILES = {
    "config.json": st.sampled_from([b'{"a": 1}', b'{"bb": 22}', b'{"ccc": 333}']),
    "tokenizer.json": st.sampled_from([b"{}", b"[1]"]),
    "model.safetensors": st.sampled_from([safetensors(n) for n in (8, 80, 800)]),
}
SNAPSHOTS = st.lists(
    st.tuples(
        st.sampled_from(["org/a", "org/b"]),
        st.fixed_dictionaries(FILES),
        st.integers(0, 4),  # when it was used
        st.booleans(),  # whether it is in use
        st.booleans(),  # whether it is chosen
    ),
    min_size=1,
    max_size=6,
)
ORPHANS = st.lists(st.sampled_from(["1", "2", "3"]), unique=True)


def users_of(paths: set[Path]) -> Holders:
    return lambda info: ("m:1",) if info.path in paths else ()


def left_after(contents: CacheContents, chosen: list[SnapshotInfo]) -> int:
    """What the cache takes when snapshots, and all that belongs to none, are gone."""
    less = plan_deletion(contents, chosen, nobody, idle)
    orphan_bytes = sum(orphan.size_bytes for orphan in less.orphans)
    return contents.total_bytes - (less.freed_bytes - orphan_bytes)


def build(cache: Path, snapshots: Any, orphans: list[str]) -> tuple[CacheContents, set[Path], Any]:
    """A cache, the snapshots in use, and those that are chosen."""
    in_use, chosen = set(), set()
    for number, (repo_id, files, used, busy, is_chosen) in enumerate(snapshots):
        repo = made_up_repo(cache, repo_id)
        path = repo.add(files, commit=f"{number:040x}")
        records.note_used(repo.folder, path.name, NOW + timedelta(days=used, seconds=number))
        in_use |= {path} if busy else set()
        chosen |= {path} if is_chosen else set()
    for digit in orphans:
        blobs = made_up_repo(cache, snapshots[0][0]).folder.blobs
        (blobs / (digit * 64)).write_bytes(digit.encode() * int(digit))
    return scan(cache), in_use, chosen


def check_executed(cache: Path, deletion: Deletion, contents: CacheContents) -> None:
    before = on_disk(cache)
    assert contents.total_bytes + contents.orphan_bytes == before
    execute(deletion, cache)
    after = scan(cache)
    assert before - on_disk(cache) == deletion.freed_bytes
    assert after.total_bytes + after.orphan_bytes == deletion.remaining_bytes == on_disk(cache)
    gone = {info.path for info in deletion.snapshots}
    assert {i.path for i in after.snapshots} == {i.path for i in contents.snapshots} - gone
    assert all(info.complete for info in after.snapshots)


@settings(max_examples=30, deadline=None)
@given(snapshots=SNAPSHOTS, orphans=ORPHANS)
def test_what_is_planned_is_what_is_freed(snapshots: Any, orphans: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        contents, in_use, chosen = build(cache, snapshots, orphans)
        meant = [info for info in contents.snapshots if info.path in chosen]
        deletion = plan_deletion(contents, meant, users_of(in_use), idle)
        assert {info.path for info in deletion.snapshots} == chosen - in_use
        assert {info.path for info in deletion.kept} == chosen & in_use
        for info in meant:
            alone = plan_deletion(contents, [info], nobody, idle)
            left_behind = sum(orphan.size_bytes for orphan in alone.orphans)
            assert alone.freed_bytes - left_behind == info.unique_bytes
        check_executed(cache, deletion, contents)


@settings(max_examples=30, deadline=None)
@given(snapshots=SNAPSHOTS, orphans=ORPHANS, max_bytes=st.integers(0, 3000))
def test_pruning_to_a_size(snapshots: Any, orphans: list[str], max_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        contents, in_use, _ = build(cache, snapshots, orphans)
        policy = PrunePolicy(max_bytes=max_bytes)
        deletion = prune(cache, policy, users_of(in_use))
        gone = {info.path for info in deletion.snapshots}
        assert not gone & in_use
        free = [info for info in contents.snapshots if info.path not in in_use]
        if deletion.remaining_bytes > max_bytes:
            assert {info.path for info in deletion.kept} == in_use
            assert deletion.holders.keys() == in_use
            assert deletion.remaining_bytes == left_after(contents, free)
        else:
            assert deletion.kept == ()
        for info in deletion.snapshots:  # none frees nothing
            others = [each for each in deletion.snapshots if each != info]
            assert left_after(contents, others) > deletion.remaining_bytes
        by_use = sorted(free, key=lambda info: info.last_used_at)
        if gone:  # with one less it would not have been enough
            last = max(index for index, info in enumerate(by_use) if info.path in gone)
            assert left_after(contents, by_use[:last]) > max_bytes
        check_executed(cache, deletion, contents)
