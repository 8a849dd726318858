"""Folders for weights on the disk: each model its own, none left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from loaderd.server.errors import CacheNotWritableError
from loaderd.server.supervisor.offload_folders import OffloadFolders, default_offload_dir


def test_nothing_is_made_before_a_model_needs_it(tmp_path: Path) -> None:
    base = tmp_path / "a" / "b"
    with OffloadFolders(base) as folders:
        folders.remove("m:1")
        assert not base.exists()
        assert folders.make("m:1").is_dir()


def test_each_model_has_a_folder_until_it_is_removed(tmp_path: Path) -> None:
    with OffloadFolders(tmp_path) as folders:
        first, second = folders.make("m:1"), folders.make("m:2")
        (first / "weights").write_text("x")
        assert first.parent.stat().st_mode & 0o077 == 0
        folders.remove("m:1")
        folders.remove("m:1")
        assert not first.exists()
        assert second.exists()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_daemon_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    left = tmp_path / "loaderd-left" / "m-1"
    left.mkdir(parents=True)
    (left.parent / "lock").touch()
    other = tmp_path / "not-ours"
    other.mkdir()
    with OffloadFolders(tmp_path) as living:
        assert not left.exists()
        mine = living.make("m:1")
        with OffloadFolders(tmp_path):
            assert mine.exists()
    assert list(tmp_path.iterdir()) == [other]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        OffloadFolders(tmp_path / "file" / "x") as folders,
        pytest.raises(CacheNotWritableError, match="offload_dir"),
    ):
        folders.make("m:1")


def test_the_default_is_below_the_users_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_offload_dir() == tmp_path / "loaderd" / "offload"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_offload_dir() == tmp_path / ".cache" / "loaderd" / "offload"
