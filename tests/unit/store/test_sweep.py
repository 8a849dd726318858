"""Partial files: those of dead downloads go, those of running ones stay."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from filelock import FileLock

from loaderd.server.store.blobs import sweep
from loaderd.server.store.cache import RepoFolder

SHA256 = "0123456789abcdef" * 4
SHA1 = "0123456789" * 4


@pytest.fixture
def repo(tmp_path: Path) -> RepoFolder:
    repo = RepoFolder(tmp_path, "org/model")
    repo.blobs.mkdir(parents=True)
    repo.locks.mkdir(parents=True)
    return repo


def partial(repo: RepoFolder, name: str, *, age: float = 0.0) -> Path:
    path = repo.blobs / name
    path.write_bytes(b"12345")
    then = time.time() - age
    os.utime(path, (then, then))
    return path


def test_what_nobody_can_go_on_from_is_deleted(repo: RepoFolder) -> None:
    orphans = [
        partial(repo, f"{SHA256}.0a1b2c3d.incomplete"),
        partial(repo, f"{SHA1}.0a1b2c3d.incomplete"),
    ]
    (repo.locks / f"{SHA1}.lock").touch()  # locks stay behind, unlocked
    kept = [
        partial(repo, SHA256),
        partial(repo, "notes.incomplete"),
        partial(repo, f"{SHA1}.incomplete", age=1e6),  # the next download goes on from it
    ]
    assert sweep(repo) == 10
    assert not any(path.exists() for path in orphans)
    assert all(path.exists() for path in kept)


def test_what_another_process_downloads_stays(repo: RepoFolder) -> None:
    running = partial(repo, f"{SHA256}.0a1b2c3d.incomplete", age=1e6)
    with FileLock(repo.locks / f"{SHA256}.lock"):
        assert sweep(repo) == 0
        assert running.exists()
    assert sweep(repo) == 5
    assert not running.exists()


def test_what_is_young_stays_when_asked(repo: RepoFolder) -> None:
    young = partial(repo, f"{SHA256}.0a1b2c3d.incomplete", age=10)
    old = partial(repo, f"{SHA1}.0a1b2c3d.incomplete", age=1000)
    assert sweep(repo, min_age=100) == 5
    assert (young.exists(), old.exists()) == (True, False)


def test_no_repository_is_no_error(tmp_path: Path) -> None:
    assert sweep(RepoFolder(tmp_path, "org/none")) == 0
