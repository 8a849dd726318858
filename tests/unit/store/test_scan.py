"""The listing of a cache."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from huggingface_hub import scan_cache_dir

from loaderd.server.store.scan import describe, scan
from tests.unit.store.caches import COMMIT, OTHER_COMMIT, SHARDED_MODEL, SMALL_MODEL, made_up_repo

UPDATED = {**SMALL_MODEL, "config.json": b'{"model_type": "mistral"}'}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Two repositories; the first has two snapshots that share all but one file."""
    repo = made_up_repo(tmp_path, "org/model")
    repo.add(SMALL_MODEL, refs=("v1",))
    repo.add(UPDATED, commit=OTHER_COMMIT, refs=("main", "v2"))
    made_up_repo(tmp_path, "org/big").add({**SHARDED_MODEL, "docs/a.md": b"hi"})
    return tmp_path


def size(files: dict[str, bytes]) -> int:
    return sum(map(len, files.values()))


def test_every_snapshot_is_listed_and_shared_blobs_count_once(cache: Path) -> None:
    os.utime(made_up_repo(cache).blob("config.json", OTHER_COMMIT), (2e9, 3e9))
    contents = scan(cache)
    assert [(s.repo_id, s.commit, s.refs, s.complete) for s in contents.snapshots] == [
        ("org/big", COMMIT, ("main",), True),
        ("org/model", OTHER_COMMIT, ("main", "v2"), True),  # changed last
        ("org/model", COMMIT, ("v1",), True),
    ]
    big, updated, first = contents.snapshots
    assert (big.file_count, big.size_bytes) == (6, size(SHARDED_MODEL) + 2)
    assert (first.file_count, first.size_bytes) == (4, size(SMALL_MODEL))
    assert contents.total_bytes == big.size_bytes + first.size_bytes + len(UPDATED["config.json"])
    assert updated.modified_at == datetime.fromtimestamp(3e9, UTC)
    assert updated.last_used_at == datetime.fromtimestamp(2e9, UTC)
    assert updated.path == made_up_repo(cache).folder.snapshot(OTHER_COMMIT)
    # Looking is no use: nothing has been accessed since.
    assert describe(made_up_repo(cache).folder, OTHER_COMMIT) == updated


def test_a_sound_cache_is_listed_as_the_library_lists_it(cache: Path) -> None:
    theirs = scan_cache_dir(cache)
    assert {
        (repo.repo_id, r.commit_hash, r.refs, r.size_on_disk, r.nb_files, r.snapshot_path)
        for repo in theirs.repos
        for r in repo.revisions
    } == {
        (s.repo_id, s.commit, frozenset(s.refs), s.size_bytes, s.file_count, s.path)
        for s in scan(cache).snapshots
    }
    assert scan(cache).total_bytes == theirs.size_on_disk


def test_damaged_snapshots_are_listed_as_incomplete(cache: Path) -> None:
    made_up_repo(cache, "org/big").blob("model-1-of-2.safetensors").unlink()
    made_up_repo(cache).folder.write_ref("gone", "f" * 40)
    complete = {(s.repo_id, s.commit): s.complete for s in scan(cache).snapshots}
    assert complete == {
        ("org/big", COMMIT): False,
        ("org/model", COMMIT): True,
        ("org/model", OTHER_COMMIT): True,
    }
    assert not {"org/big", "org/model"} & {repo.repo_id for repo in scan_cache_dir(cache).repos}


def test_no_cache_and_an_empty_one_are_empty(tmp_path: Path) -> None:
    for cache in (tmp_path, tmp_path / "missing"):
        assert scan(cache).snapshots == ()
        assert scan(cache).total_bytes == 0


def test_datasets_and_strangers_are_left_out(tmp_path: Path) -> None:
    for path in ("datasets--org--data/snapshots", "models--org--x/snapshots/main", "stray"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "version.txt").write_text("1")
    assert scan(tmp_path).snapshots == ()
