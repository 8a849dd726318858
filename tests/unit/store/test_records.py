"""What the daemon remembers of a repository."""

from __future__ import annotations

import errno
import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from filelock import FileLock
from huggingface_hub import scan_cache_dir

from loaderd.server.errors import CacheNotWritableError
from loaderd.server.store import records
from loaderd.server.store.cache import RepoFolder
from tests.unit.store.caches import COMMIT, OTHER_COMMIT, SMALL_MODEL, made_up_repo

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def repo(tmp_path: Path) -> RepoFolder:
    made_up_repo(tmp_path).add(SMALL_MODEL)
    return made_up_repo(tmp_path).folder


def test_the_last_use_never_goes_back(repo: RepoFolder) -> None:
    assert records.last_used(repo) == {}
    records.note_used(repo, COMMIT, NOON)
    records.note_used(repo, COMMIT, NOON - timedelta(hours=1))
    records.note_used(repo, OTHER_COMMIT, NOON.astimezone(timezone(timedelta(hours=5))))
    assert records.last_used(repo) == {COMMIT: NOON, OTHER_COMMIT: NOON}
    records.note_used(repo, COMMIT, NOON + timedelta(hours=1))
    assert records.last_used(repo)[COMMIT] == NOON + timedelta(hours=1)


def test_the_last_whole_commit_of_each_revision(repo: RepoFolder) -> None:
    records.note_complete(repo, "main", COMMIT)
    records.note_complete(repo, "pr/1", COMMIT)
    records.note_complete(repo, "main", OTHER_COMMIT)
    records.note_used(repo, COMMIT, NOON)
    assert records.last_complete(repo, "main") == OTHER_COMMIT
    assert records.last_complete(repo, "pr/1") == COMMIT
    assert records.last_complete(repo, "v1") is None


def test_contents_that_were_hashed_until_they_are_gone(repo: RepoFolder) -> None:
    kept, gone = sorted(path.name for path in repo.blobs.iterdir())[:2]
    records.note_hashed(repo, {kept: "1-2-3"})
    records.note_hashed(repo, {gone: "4-5-6"})
    records.note_used(repo, COMMIT, NOON)
    assert records.hashed(repo) == {kept: "1-2-3", gone: "4-5-6"}
    (repo.blobs / gone).unlink()
    records.forget(repo, [COMMIT])
    assert records.hashed(repo) == {kept: "1-2-3"}


def test_what_is_deleted_is_forgotten(repo: RepoFolder) -> None:
    for revision, commit in (("main", COMMIT), ("v2", OTHER_COMMIT)):
        records.note_used(repo, commit, NOON)
        records.note_complete(repo, revision, commit)
    records.forget(repo, [COMMIT])
    assert records.last_used(repo) == {OTHER_COMMIT: NOON}
    assert records.last_complete(repo, "main") is None
    assert records.last_complete(repo, "v2") == OTHER_COMMIT


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff{",
        b"[]",
        b"[" * 100_000,
        b'{"format_version": 1}',
        b'{"format_version": 2, "used": {}, "complete": {}}',
        b'{"format_version": 1, "used": {"a": 5}, "complete": {}}',
        b'{"format_version": 1, "used": {"a": "soon"}, "complete": {}}',
        b'{"format_version": 1, "used": {}, "complete": {"main": "../../etc"}}',
    ],
)
def test_a_damaged_file_is_as_if_empty_and_replaced(repo: RepoFolder, damage: bytes) -> None:
    records.path_of(repo).write_bytes(damage)
    assert records.last_used(repo) == {}
    assert records.last_complete(repo, "main") is None
    records.note_complete(repo, "main", COMMIT)
    assert records.last_complete(repo, "main") == COMMIT


def test_writers_at_the_same_time_lose_nothing(repo: RepoFolder) -> None:
    commits = [f"{number:040x}" for number in range(16)]
    writers = [
        threading.Thread(target=records.note_used, args=(repo, commit, NOON)) for commit in commits
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert records.last_used(repo).keys() == set(commits)


def test_a_lock_that_nobody_lets_go_of_is_not_waited_for_for_ever(
    repo: RepoFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loaderd.server.store.locks.LONGEST_WAIT", 0.1)
    repo.locks.mkdir(parents=True)
    with FileLock(repo.lock("loaderd")), pytest.raises(TimeoutError, match=r"loaderd\.lock"):
        records.note_used(repo, COMMIT, NOON)
    records.note_used(repo, COMMIT, NOON)
    assert records.last_used(repo) == {COMMIT: NOON}


def test_the_hub_library_does_not_mind_the_file(repo: RepoFolder) -> None:
    before = scan_cache_dir(repo.cache_dir)
    records.note_used(repo, COMMIT, NOON)
    after = scan_cache_dir(repo.cache_dir)
    assert after.warnings == []
    assert after.size_on_disk == before.size_on_disk
    assert [each.repo_id for each in after.repos] == ["org/model"]


def test_nothing_is_remembered_of_a_repository_that_is_not_there(tmp_path: Path) -> None:
    records.note_used(RepoFolder(tmp_path, "org/gone"), COMMIT, NOON)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_to_is_told(
    repo: RepoFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, text: str) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "write_text", refuse)  # the tests may run as root
    with pytest.raises(CacheNotWritableError, match=r"org--model/.*: Read-only file system"):
        records.note_used(repo, COMMIT, NOON)
    monkeypatch.undo()
    assert records.last_used(repo) == {}
    records.note_used(repo, COMMIT, NOON)
    assert records.last_used(repo) == {COMMIT: NOON}
