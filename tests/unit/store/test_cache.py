"""The cache's layout is the hub library's: the library itself is asked."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import get_cached_repo_tree, snapshot_download
from huggingface_hub.file_download import repo_folder_name

from loaderd.server.errors import CacheNotWritableError
from loaderd.server.store.cache import RepoFolder, TreeEntry, writing
from tests.unit.store.caches import COMMIT, OTHER_COMMIT, SMALL_MODEL, entry, made_up_repo

_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
_PROGRAM = """
from pathlib import Path
from huggingface_hub import constants
from loaderd.server.store.cache import default_cache_dir
print(Path(constants.HF_HUB_CACHE).absolute(), default_cache_dir(), sep="\\n")
"""


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"XDG_CACHE_HOME": "/xdg"},
        {"XDG_CACHE_HOME": "/xdg", "HF_HOME": "~/hf"},
        {"HF_HOME": "relative/home"},
        {"HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "$HOME/legacy"},
        {"HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "/legacy", "HF_HUB_CACHE": "~/new/$USER"},
        {"HF_HUB_CACHE": ""},
        {"HF_HOME": ""},
    ],
    ids=str,
)
def test_the_default_cache_is_that_of_the_library(
    variables: dict[str, str], tmp_path: Path
) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env=kept | {"HOME": str(tmp_path), "USER": "ada"} | variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    theirs, ours = done.stdout.splitlines()
    assert ours == theirs


@pytest.mark.parametrize("repo_id", ["gpt2", "org/model", "org-1/a_b.c"])
def test_folders_are_named_as_the_library_names_them(tmp_path: Path, repo_id: str) -> None:
    repo = RepoFolder(tmp_path, repo_id)
    assert repo.path.name == repo_folder_name(repo_id=repo_id, repo_type="model")
    repo.path.mkdir()
    assert list(RepoFolder.all(tmp_path)) == [repo]


def test_only_folders_of_models_are_repositories(tmp_path: Path) -> None:
    for name in ("datasets--org--data", "models--org--a--b", "models--", "models--.x", ".locks"):
        (tmp_path / name).mkdir()
    (tmp_path / "models--org--file").touch()
    assert list(RepoFolder.all(tmp_path)) == []
    assert list(RepoFolder.all(tmp_path / "missing")) == []


def test_the_library_reads_our_listing_and_refs(tmp_path: Path) -> None:
    repo = made_up_repo(tmp_path)
    repo.add(SMALL_MODEL, listing=SMALL_MODEL)
    theirs = get_cached_repo_tree("org/model", revision="main", cache_dir=tmp_path)
    assert {f.path: (f.size, f.blob_id) for f in theirs} == {
        name: (len(content), entry(name, content).blob_id) for name, content in SMALL_MODEL.items()
    }
    path = snapshot_download("org/model", cache_dir=tmp_path, local_files_only=True)
    assert Path(path) == repo.folder.snapshot(COMMIT)


def test_a_listing_is_read_as_it_was_written(tmp_path: Path) -> None:
    repo = RepoFolder(tmp_path, "org/model")
    tree = {"a/b.json": TreeEntry(3, "d" * 40), "m.safetensors": TreeEntry(9, "e" * 40, "f" * 64)}
    repo.write_tree(COMMIT, tree)
    assert repo.read_tree(COMMIT) == tree
    assert repo.read_tree(OTHER_COMMIT) is None
    assert {path.name for path in repo.path.rglob("*")} == {"trees", f"{COMMIT}.json"}


def test_refs_are_those_that_hold_a_commit(tmp_path: Path) -> None:
    repo = RepoFolder(tmp_path, "org/model")
    for revision in ("main", "refs/pr/1"):
        repo.write_ref(revision, COMMIT)
    repo.write_ref("v2", OTHER_COMMIT)
    repo.write_ref(COMMIT, COMMIT)  # a commit needs none
    refs = repo.path / "refs"
    (refs / "broken").write_text("nothing")
    (refs / "main.0123abcd.tmp").write_text(COMMIT)  # of a process that was killed
    assert repo.refs() == {COMMIT: ["main", "refs/pr/1"], OTHER_COMMIT: ["v2"]}
    repo.write_ref("main", OTHER_COMMIT)
    assert repo.commit_of("main") == OTHER_COMMIT
    assert repo.commit_of("refs") is None
    assert repo.commit_of("main/x") is None


def test_a_branch_takes_the_place_of_one_that_was(tmp_path: Path) -> None:
    repo = RepoFolder(tmp_path, "org/model")
    for revision in ("dev", "dev/x", "dev"):
        repo.write_ref(revision, COMMIT)
        assert repo.commit_of(revision) == COMMIT


def _no_locks(_path: Path) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize(
    ("attempt", "problem"),
    [
        (Path.mkdir, "File exists"),
        (lambda path: (path / "blobs").mkdir(), "Not a directory"),
        (lambda path: path.parent.write_bytes(b""), "Is a directory"),
        (_no_locks, "No locks available"),
    ],
)
def test_a_cache_that_is_no_place_for_files_is_told(
    tmp_path: Path, attempt: Callable[[Path], None], problem: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheNotWritableError, match=problem), writing(tmp_path):
        attempt(tmp_path / "file")
