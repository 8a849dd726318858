"""The listing of a cache."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from huggingface_hub import scan_cache_dir

from loaderd.server.store import records
from loaderd.server.store.scan import CacheScanner, describe
from tests.unit.store.caches import (
    COMMIT,
    OTHER_COMMIT,
    SHARDED_MODEL,
    SMALL_MODEL,
    entry,
    made_up_repo,
    move_to_shared_store,
    safetensors,
    scan,
    write_folder,
)

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


def test_what_is_shared_is_unique_to_nobody(cache: Path) -> None:
    unique = {(info.repo_id, info.commit): info.unique_bytes for info in scan(cache).snapshots}
    assert unique == {
        ("org/big", COMMIT): size(SHARDED_MODEL) + 2,
        ("org/model", COMMIT): len(SMALL_MODEL["config.json"]),
        ("org/model", OTHER_COMMIT): len(UPDATED["config.json"]),
    }


def test_contents_in_the_shared_store_are_followed_and_not_freed(cache: Path) -> None:
    repo = made_up_repo(cache)
    total = scan(cache).total_bytes
    shared = move_to_shared_store(repo.blob("model.safetensors"), cache)
    shutil.rmtree(repo.folder.snapshot(OTHER_COMMIT))
    left = describe(repo.folder, COMMIT)
    assert (left.size_bytes, left.complete) == (size(SMALL_MODEL), True)
    assert left.unique_bytes == size(SMALL_MODEL) - len(SMALL_MODEL["model.safetensors"])
    assert scan(cache).total_bytes == total - len(UPDATED["config.json"])
    shared.write_bytes(b"short")
    assert not describe(repo.folder, COMMIT).complete


def test_files_without_links_are_listed(cache: Path) -> None:
    snapshot = made_up_repo(cache, "org/plain").folder.snapshot(COMMIT)
    write_folder(snapshot, {**SMALL_MODEL, "docs/a.md": b"hi"})
    plain = scan(cache).snapshots[-1]
    assert (plain.repo_id, plain.complete, plain.file_count) == ("org/plain", True, 5)
    assert plain.unique_bytes == plain.size_bytes == size(SMALL_MODEL) + 2


def test_what_belongs_to_no_snapshot_is_told(cache: Path) -> None:
    repo = made_up_repo(cache).folder
    before = scan(cache).total_bytes
    for name, length in ((f"{'1' * 64}.incomplete", 7), ("2" * 40, 5), ("notes.txt", 3)):
        (repo.blobs / name).write_bytes(b"x" * length)
    contents = scan(cache)
    assert contents.orphan_bytes == 12
    assert [orphan.path.name for orphan in contents.orphans] == [
        f"{'1' * 64}.incomplete",
        "2" * 40,
    ]
    assert contents.total_bytes == before


def test_a_use_that_the_daemon_remembers_counts(cache: Path) -> None:
    repo = made_up_repo(cache).folder
    later, earlier = datetime(2100, 1, 1, tzinfo=UTC), datetime(2000, 1, 1, tzinfo=UTC)
    records.note_used(repo, COMMIT, later)
    records.note_used(repo, OTHER_COMMIT, earlier)
    assert describe(repo, COMMIT).last_used_at == later
    assert describe(repo, OTHER_COMMIT).last_used_at > earlier


def test_what_is_not_there_cannot_be_described(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        describe(made_up_repo(tmp_path).folder, COMMIT)


def in_place(path: Path, content: bytes) -> None:
    """Rewrites a file that looks as before: same size, same dates."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def weights(cache: Path) -> Path:
    return made_up_repo(cache, "org/big").blob("model-1-of-2.safetensors")


def big(cache: Path) -> Path:
    return made_up_repo(cache, "org/big").folder.path


CHANGES: dict[str, Callable[[Path], object]] = {
    "a repository comes": lambda cache: made_up_repo(cache, "org/new").add(SMALL_MODEL),
    "a repository goes": lambda cache: shutil.rmtree(big(cache)),
    "a snapshot comes": lambda cache: made_up_repo(cache).add(SMALL_MODEL, commit="c" * 40),
    "a snapshot goes": lambda cache: shutil.rmtree(made_up_repo(cache).folder.snapshot(COMMIT)),
    "a file comes": lambda cache: made_up_repo(cache).add({"new.json": b"{}"}, refs=()),
    "a file in a folder comes": lambda cache: made_up_repo(cache, "org/big").add(
        {"docs/b.md": b"ho"}, refs=()
    ),
    "a file goes": lambda cache: (big(cache) / "snapshots" / COMMIT / "config.json").unlink(),
    "a blob goes": lambda cache: weights(cache).unlink(),
    "a blob is cut short": lambda cache: os.truncate(weights(cache), 20),
    "a blob is rewritten in place": lambda cache: in_place(
        weights(cache), b"\xff" * weights(cache).stat().st_size
    ),
    "a blob is read": lambda cache: os.utime(
        weights(cache), ns=(4 * 10**18, weights(cache).stat().st_mtime_ns)
    ),
    "a blob is left over": lambda cache: (big(cache) / "blobs" / ("9" * 64)).write_bytes(b"12"),
    "a download begins": lambda cache: (
        big(cache) / "blobs" / f"{'9' * 64}.0a1b2c3d.incomplete"
    ).write_bytes(b"12"),
    "a ref comes": lambda cache: made_up_repo(cache).folder.write_ref("pr/1", COMMIT),
    "a ref moves": lambda cache: made_up_repo(cache).folder.write_ref("main", COMMIT),
    "a ref is rewritten in place": lambda cache: in_place(
        made_up_repo(cache).folder.path / "refs/main", COMMIT.encode()
    ),
    "a ref goes": lambda cache: (big(cache) / "refs/main").unlink(),
    "a listing comes": lambda cache: made_up_repo(cache).folder.write_tree(
        COMMIT, {"config.json": entry("config.json", b"another")}
    ),
    "a use is remembered": lambda cache: records.note_used(
        made_up_repo(cache).folder, COMMIT, datetime(2100, 1, 1, tzinfo=UTC)
    ),
    "a file without a link changes": lambda cache: in_place(
        cache / f"models--org--plain/snapshots/{COMMIT}/model.safetensors",
        b"\xff" * len(SMALL_MODEL["model.safetensors"]),
    ),
    "a link to elsewhere leads somewhere": lambda cache: (cache / "elsewhere").write_bytes(b"1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_shows_at_once(cache: Path, change: str) -> None:
    plain = made_up_repo(cache, "org/plain").folder.snapshot(COMMIT)
    write_folder(plain, SMALL_MODEL)
    (plain / "link").symlink_to(cache / "elsewhere")
    time.sleep(0.2)  # what changed just now is looked into again anyway
    scanner = CacheScanner(cache)
    before = scanner.scan()
    assert scanner.scan() is before
    CHANGES[change](cache)
    after = scanner.scan()
    assert after != before
    assert after == scan(cache)


def test_changes_in_a_row_all_show(cache: Path) -> None:
    scanner = CacheScanner(cache)
    for fill in (b"\1", b"\xff", b"\1", b"\xff"):
        content = safetensors(10, fill) if fill == b"\1" else fill * len(safetensors(10))
        in_place(weights(cache), content)
        assert scanner.scan().snapshots[0].complete == (fill == b"\1")


def test_many_threads_may_list_one_cache(cache: Path) -> None:
    scanner = CacheScanner(cache)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: scanner.scan(), range(32)))
    assert all(each == scan(cache) for each in found)
