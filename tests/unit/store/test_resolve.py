"""Resolution on made-up caches and folders: what is whole, what is not, and what is said."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loaderd.server.errors import (
    InvalidNameError,
    LoaderdError,
    ModelNotFoundError,
    ModelUnsupportedError,
    SnapshotCorruptError,
    SnapshotIncompleteError,
)
from loaderd.server.store.names import HubName, LocalName
from loaderd.server.store.resolve import CachedSnapshot, LocalFolder, NotCached, resolve
from tests.unit.store.caches import (
    COMMIT,
    CONFIG,
    OTHER_COMMIT,
    SHARDED_MODEL,
    SMALL_MODEL,
    MadeUpRepo,
    index,
    made_up_repo,
    open_to_all,
    safetensors,
    write_folder,
)

NAME = HubName("org/model")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def repo(cache: Path) -> MadeUpRepo:
    return made_up_repo(cache)


def find(cache: Path, name: HubName = NAME) -> CachedSnapshot | NotCached:
    found = resolve(name, cache_dir=cache, local_roots=())
    assert not isinstance(found, LocalFolder)
    return found


def problem(cache: Path, name: HubName = NAME) -> LoaderdError:
    found = find(cache, name)
    assert isinstance(found, NotCached)
    assert found.problem is not None
    return found.problem


# --- the cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [SMALL_MODEL, SHARDED_MODEL], ids=["one file", "shards"])
@pytest.mark.parametrize("listed", [True, False], ids=["with listing", "without"])
def test_a_whole_snapshot_is_found(
    cache: Path, repo: MadeUpRepo, files: dict[str, bytes], listed: bool
) -> None:
    folder = repo.add({**files, "README.md": b"hello"}, listing=files if listed else None)
    size = sum(map(len, files.values()))
    assert find(cache) == CachedSnapshot("org/model", "main", COMMIT, folder, size)


def test_no_cache_no_repository_and_no_revision_are_not_cached(
    cache: Path, repo: MadeUpRepo
) -> None:
    assert find(cache) == NotCached(NAME)
    repo.add(SMALL_MODEL)
    other_repo, other_revision = HubName("org/other"), HubName("org/model", "v2")
    assert find(cache, other_repo) == NotCached(other_repo)
    assert find(cache, other_revision) == NotCached(other_revision)


def test_the_current_snapshot_is_what_the_ref_says(cache: Path, repo: MadeUpRepo) -> None:
    repo.add(SMALL_MODEL, commit=COMMIT, refs=("main", "v1"))
    repo.add({**SMALL_MODEL, "config.json": b"{}"}, commit=OTHER_COMMIT, refs=("main", "refs/pr/1"))
    expected = {"main": OTHER_COMMIT, "v1": COMMIT, "refs/pr/1": OTHER_COMMIT, COMMIT: COMMIT}
    for revision, commit in expected.items():
        found = find(cache, HubName("org/model", revision))
        assert isinstance(found, CachedSnapshot)
        assert (found.commit, found.revision) == (commit, revision)


@pytest.mark.parametrize("content", ["", "main", "../../../etc", COMMIT[:39], COMMIT.upper()])
def test_a_ref_that_holds_no_commit_is_not_followed(
    cache: Path, repo: MadeUpRepo, content: str
) -> None:
    repo.add(SMALL_MODEL)
    (repo.folder.path / "refs" / "main").write_text(content)
    assert find(cache) == NotCached(NAME)


def test_a_ref_whose_snapshot_is_gone_is_not_cached(cache: Path, repo: MadeUpRepo) -> None:
    repo.folder.write_ref("main", COMMIT)
    assert find(cache) == NotCached(NAME)


@pytest.mark.parametrize("name", ["config.json", "model-2-of-2.safetensors", "tokenizer.json"])
def test_a_dangling_link_makes_a_snapshot_incomplete(
    cache: Path, repo: MadeUpRepo, name: str
) -> None:
    repo.add(SHARDED_MODEL)
    repo.blob(name).unlink()
    error = problem(cache)
    assert isinstance(error, SnapshotIncompleteError)
    assert (error.model, error.file) == ("org/model", name)


@pytest.mark.parametrize(
    "missing", ["config.json", "model-1-of-2.safetensors", "model.safetensors.index.json"]
)
def test_what_loading_always_needs_must_be_there(
    cache: Path, repo: MadeUpRepo, missing: str
) -> None:
    repo.add({n: c for n, c in SHARDED_MODEL.items() if n != missing}, listing=SHARDED_MODEL)
    error = problem(cache)
    assert isinstance(error, SnapshotIncompleteError)
    assert error.file == missing


def test_a_tokenizer_alone_is_an_incomplete_snapshot(cache: Path, repo: MadeUpRepo) -> None:
    repo.add({"config.json": CONFIG, "tokenizer.json": b"{}"})
    assert isinstance(problem(cache), SnapshotIncompleteError)


def test_a_listed_tokenizer_must_be_there_and_other_small_files_need_not(
    cache: Path, repo: MadeUpRepo
) -> None:
    listing = {**SMALL_MODEL, "params.json": b"{}", "LICENSE.txt": b"..."}
    repo.add(SMALL_MODEL, listing=listing)
    assert isinstance(find(cache), CachedSnapshot)
    (repo.folder.snapshot(COMMIT) / "tokenizer.json").unlink()
    error = problem(cache)
    assert isinstance(error, SnapshotIncompleteError)
    assert error.file == "tokenizer.json"


def test_a_file_of_another_size_than_listed_is_corrupt(cache: Path, repo: MadeUpRepo) -> None:
    repo.add(SMALL_MODEL, listing=SMALL_MODEL)
    repo.blob("tokenizer.json").write_bytes(b'{"x"')
    assert vars(problem(cache)) == {
        "model": "org/model", "file": "tokenizer.json", "expected": "2 bytes", "found": "4 bytes"
    }  # fmt: skip


def test_weights_cut_short_are_corrupt_without_any_listing(cache: Path, repo: MadeUpRepo) -> None:
    repo.add(SMALL_MODEL)
    blob = repo.blob("model.safetensors")
    whole = blob.read_bytes()
    blob.write_bytes(whole[:-1])
    assert vars(problem(cache)) == {
        "model": "org/model",
        "file": "model.safetensors",
        "expected": f"{len(whole)} bytes",
        "found": f"{len(whole) - 1} bytes",
    }


@pytest.mark.parametrize("shard", ["../model/evil.safetensors", "/evil.safetensors", "x.bin", ""])
def test_an_index_that_leads_elsewhere_is_corrupt(
    cache: Path, repo: MadeUpRepo, shard: str
) -> None:
    evil = index("model-1-of-2.safetensors", shard)
    repo.add({**SHARDED_MODEL, "model.safetensors.index.json": evil})
    error = problem(cache)
    assert isinstance(error, SnapshotCorruptError)
    assert error.file == "model.safetensors.index.json"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "chat_template.jinja"])
def test_a_link_out_of_the_repository_is_corrupt(
    cache: Path, repo: MadeUpRepo, tmp_path: Path, name: str
) -> None:
    folder = repo.add({**SMALL_MODEL, "chat_template.jinja": b""})
    outside = write_folder(tmp_path / "outside", SMALL_MODEL) / "config.json"
    (folder / name).unlink()
    (folder / name).symlink_to(outside)
    error = problem(cache)
    assert isinstance(error, SnapshotCorruptError)
    assert error.file == name


def test_a_blob_in_the_store_that_repositories_share_is_as_good(
    cache: Path, repo: MadeUpRepo
) -> None:
    repo.add(SMALL_MODEL)
    blob = repo.blob("model.safetensors")
    shared = cache / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(f"../../blobs/ab/{shared.name}")
    assert isinstance(problem(cache), SnapshotCorruptError)  # not the library's own folder
    (cache / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    assert isinstance(find(cache), CachedSnapshot)


def test_a_cache_without_links_is_as_good(cache: Path, repo: MadeUpRepo) -> None:
    write_folder(repo.folder.snapshot(COMMIT), SMALL_MODEL)
    repo.folder.write_ref("main", COMMIT)
    assert isinstance(find(cache), CachedSnapshot)


def test_a_repository_on_another_disk_is_as_good(
    cache: Path, repo: MadeUpRepo, tmp_path: Path
) -> None:
    repo.add(SMALL_MODEL)
    repo.folder.path.rename(tmp_path / "elsewhere")
    repo.folder.path.symlink_to(tmp_path / "elsewhere")
    assert isinstance(find(cache), CachedSnapshot)


def test_pickles_are_not_loaded(cache: Path, repo: MadeUpRepo) -> None:
    repo.add({"config.json": CONFIG, "pytorch_model.bin": b"pickle"})
    error = problem(cache)
    assert isinstance(error, ModelUnsupportedError)
    assert "safetensors" in error.problem


@pytest.mark.parametrize("listing", ["{", "[]", '{"format_version": 2, "files": {}}', "null"])
def test_a_listing_that_cannot_be_read_is_ignored(
    cache: Path, repo: MadeUpRepo, listing: str
) -> None:
    repo.add(SMALL_MODEL)
    (repo.folder.path / "trees").mkdir()
    (repo.folder.path / "trees" / f"{COMMIT}.json").write_text(listing)
    assert isinstance(find(cache), CachedSnapshot)


# --- local folders -------------------------------------------------------------------------------


def local(path: Path, *roots: Path) -> LocalFolder:
    found = resolve(LocalName(path), cache_dir=path / "no-cache", local_roots=roots or None)
    assert isinstance(found, LocalFolder)
    return found


@pytest.mark.parametrize("files", [SMALL_MODEL, SHARDED_MODEL], ids=["one file", "shards"])
def test_a_local_folder_is_found_by_its_real_path(tmp_path: Path, files: dict[str, bytes]) -> None:
    folder = write_folder(tmp_path / "real", files)
    link = tmp_path / "link"
    link.symlink_to(folder)
    expected = LocalFolder(folder.resolve(), sum(map(len, files.values())))
    assert local(folder) == local(link) == local(link, tmp_path) == expected
    assert local(folder, folder) == expected


def test_a_folder_outside_the_roots_is_refused_whether_it_exists_or_not(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_folder(root, SMALL_MODEL)
    outside = write_folder(tmp_path / "root-beside", SMALL_MODEL)
    (root / "link").symlink_to(outside)
    for path in (outside, root / "link", root / ".." / outside.name, tmp_path / "nothing"):
        with pytest.raises(InvalidNameError) as caught:
            local(path, root)
        assert f"--allow-local {path}" in caught.value.problem


def test_a_file_that_links_out_of_the_roots_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "root" / "model", SMALL_MODEL)
    weights = folder / "model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(InvalidNameError) as caught:
        local(folder, tmp_path / "root")
    assert "model.safetensors" in caught.value.problem
    assert "--allow-local" in caught.value.problem
    assert "elsewhere" not in caught.value.problem
    assert local(folder, tmp_path / "root", tmp_path).path == folder.resolve()


def test_what_is_no_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        local(tmp_path / "nothing")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(InvalidNameError, match="is a file"):
        local(file)


_UNREADABLE = """
import os, sys
from pathlib import Path
from loaderd.server.store.names import LocalName
from loaderd.server.store.resolve import resolve
os.setuid(65534)
try:
    resolve(LocalName(Path(sys.argv[1])), cache_dir=Path("/"), local_roots=None)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can take another user's place")
@pytest.mark.parametrize("unreadable", [".", "model.safetensors"])
def test_what_the_daemons_user_may_not_read_is_said(tmp_path: Path, unreadable: str) -> None:
    open_to_all(tmp_path)
    folder = write_folder(tmp_path / "model", SMALL_MODEL)
    (folder / unreadable).chmod(0)
    done = subprocess.run(
        [sys.executable, "-c", _UNREADABLE, folder],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.startswith("InvalidNameError")
    assert "may not read" in done.stdout


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_bytes(CONFIG[:-1])


def _only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_bytes(index("a.safetensors"))


def _weights_are_a_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_bytes(index("a.safetensors"))
    (folder / "a.safetensors").mkdir()


@pytest.mark.parametrize(
    ("damage", "error", "file"),
    [
        (_truncate, SnapshotCorruptError, "model.safetensors"),
        (_no_config, SnapshotIncompleteError, "config.json"),
        (_broken_config, SnapshotCorruptError, "config.json"),
        (_only_pickles, ModelUnsupportedError, None),
        (_missing_shard, SnapshotIncompleteError, "a.safetensors"),
        (_weights_are_a_folder, SnapshotIncompleteError, "a.safetensors"),
    ],
)
def test_a_damaged_local_folder_raises(
    tmp_path: Path, damage: Callable[[Path], None], error: type[LoaderdError], file: str | None
) -> None:
    folder = write_folder(tmp_path / "model", SMALL_MODEL)
    damage(folder)
    with pytest.raises(error) as caught:
        local(folder)
    assert getattr(caught.value, "file", None) == file
    assert caught.value.metadata["model"] == str(folder)


def test_the_larger_of_two_models_wins_nothing_the_single_file_does(tmp_path: Path) -> None:
    files = {**SHARDED_MODEL, "model.safetensors": safetensors(5)}
    expected = ("config.json", "model.safetensors", "tokenizer.json")
    folder = write_folder(tmp_path, files)
    assert local(folder).size_bytes == sum(len(files[name]) for name in expected)
