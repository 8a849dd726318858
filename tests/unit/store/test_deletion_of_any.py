"""Deleting from caches of all kinds: the plan says what the disk gets back."""

from __future__ import annotations

import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from loaderd.server.store import records
from loaderd.server.store.deletion import Deletion, Holders, PrunePolicy, plan_deletion
from loaderd.server.store.scan import CacheContents, SnapshotInfo
from tests.unit.store.caches import made_up_repo, safetensors, scan
from tests.unit.store.deletions import NOW, execute, idle, nobody, on_disk, prune

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


@settings(max_examples=30)
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


@settings(max_examples=30)
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
