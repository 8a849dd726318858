"""Repositories whose weights are pickles: taken only where the operator allows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loaderd.server.errors import (
    LoaderdError,
    ModelUnsupportedError,
    SnapshotCorruptError,
    SnapshotIncompleteError,
)
from loaderd.server.store import hub as hub_functions
from loaderd.server.store.cache import RepoFolder
from loaderd.server.store.hub_access import HubAccess
from loaderd.server.store.names import HubName, LocalName
from loaderd.server.store.plan import SkipReason
from loaderd.server.store.resolve import (
    CachedSnapshot,
    LocalFolder,
    NotCached,
    allows_pickle,
    resolve,
)
from tests.hub import Hub, HubRepo
from tests.unit.store.caches import (
    CONFIG,
    SMALL_MODEL,
    index,
    made_up_repo,
    safetensors,
    write_folder,
)

NAME = HubName("org/model")
ONE_PICKLE: dict[str, bytes] = {
    "config.json": CONFIG,
    "pytorch_model.bin": b"a pickle of tensors",
    "tokenizer.json": b"{}",
}
PICKLES: dict[str, bytes] = {
    "config.json": CONFIG,
    "pytorch_model-1-of-2.bin": b"some tensors",
    "pytorch_model-2-of-2.bin": b"and the others",
    "pytorch_model.bin.index.json": index("pytorch_model-1-of-2.bin", "pytorch_model-2-of-2.bin"),
    "tokenizer.json": b"{}",
}
FORMS = pytest.mark.parametrize("files", [ONE_PICKLE, PICKLES], ids=["one file", "shards"])


def size(files: dict[str, bytes]) -> int:
    return sum(map(len, files.values()))


def find(cache: Path, *, allow_pickle: bool) -> CachedSnapshot | NotCached:
    found = resolve(NAME, cache_dir=cache, local_roots=(), allow_pickle=allow_pickle)
    assert not isinstance(found, LocalFolder)
    return found


def problem(cache: Path, *, allow_pickle: bool) -> LoaderdError:
    found = find(cache, allow_pickle=allow_pickle)
    assert isinstance(found, NotCached)
    assert found.problem is not None
    return found.problem


@FORMS
@pytest.mark.parametrize("listed", [True, False], ids=["with listing", "without"])
def test_cached_pickles(tmp_path: Path, files: dict[str, bytes], listed: bool) -> None:
    made_up_repo(tmp_path).add(files, listing=files if listed else None)
    refused = problem(tmp_path, allow_pickle=False)
    assert isinstance(refused, ModelUnsupportedError)
    assert "--allow-pickle org/model" in str(refused)
    found = find(tmp_path, allow_pickle=True)
    assert isinstance(found, CachedSnapshot)
    assert found.size_bytes == size(files)


@FORMS
def test_local_pickles(tmp_path: Path, files: dict[str, bytes]) -> None:
    name = LocalName(write_folder(tmp_path / "model", files))
    with pytest.raises(ModelUnsupportedError) as refused:
        resolve(name, cache_dir=tmp_path, local_roots=None)
    assert f"--allow-pickle {name.path}" in refused.value.problem
    found = resolve(name, cache_dir=tmp_path, local_roots=None, allow_pickle=True)
    assert found == LocalFolder(name.path.resolve(), size(files))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shard = "pytorch_model-2-of-2.bin"
    made_up_repo(tmp_path).add({n: c for n, c in PICKLES.items() if n != shard}, listing=PICKLES)
    error = problem(tmp_path, allow_pickle=True)
    assert isinstance(error, SnapshotIncompleteError)
    assert error.file == shard


@pytest.mark.parametrize("shard", ["../other/model.bin", "/model.bin", "model.safetensors", ""])
def test_an_index_that_leads_elsewhere_is_corrupt(tmp_path: Path, shard: str) -> None:
    name = "pytorch_model.bin.index.json"
    made_up_repo(tmp_path).add({**PICKLES, name: index(shard)})
    error = problem(tmp_path, allow_pickle=True)
    assert isinstance(error, SnapshotCorruptError)
    assert error.file == name


def test_safetensors_are_taken_where_there_are_any(tmp_path: Path) -> None:
    made_up_repo(tmp_path).add({**SMALL_MODEL, **ONE_PICKLE})
    found = find(tmp_path, allow_pickle=True)
    assert isinstance(found, CachedSnapshot)
    assert found.size_bytes == size({**SMALL_MODEL, "tokenizer.json": b"{}"})


def test_a_model_is_allowed_by_its_repository_or_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (tmp_path / "link").symlink_to(folder)
    allowed = ("org/model", str(folder))
    assert allows_pickle(allowed, NAME)
    assert allows_pickle(allowed, HubName("org/model", "v1"))
    assert allows_pickle(allowed, LocalName(tmp_path / "link"))
    assert not allows_pickle(allowed, HubName("org/other"))
    assert not allows_pickle(allowed, LocalName(folder / "below"))


# --- plans ---------------------------------------------------------------------------------------


@pytest.fixture
def repo() -> HubRepo:
    return HubRepo("org/model")


@pytest.fixture
def access(repo: HubRepo) -> Iterator[HubAccess]:
    with Hub(repo) as hub:
        yield HubAccess(hub.url)


@FORMS
def test_a_plan_without_leave_is_refused_by_name(
    repo: HubRepo, access: HubAccess, tmp_path: Path, files: dict[str, bytes]
) -> None:
    repo.commit(files)
    with pytest.raises(ModelUnsupportedError) as refused:
        hub_functions.plan(NAME, tmp_path, access)
    assert "--allow-pickle org/model" in refused.value.problem


@FORMS
def test_a_plan_with_leave(
    repo: HubRepo, access: HubAccess, tmp_path: Path, files: dict[str, bytes]
) -> None:
    repo.commit({**files, "tf_model.h5": b"x" * 9, "model.fp16.safetensors": safetensors()})
    plan = hub_functions.plan(NAME, tmp_path, access, allow_pickle=True)
    assert {file.path: file.size_bytes for file in plan.files} == {
        name: len(content) for name, content in files.items()
    }
    assert {file.path: file.reason for file in plan.skipped} == {
        "tf_model.h5": SkipReason.OTHER_FORMAT,
        "model.fp16.safetensors": SkipReason.OTHER_COPY,
    }
    snapshot = hub_functions.download(plan, tmp_path, access).path
    assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == files


def test_a_plan_never_has_both_formats(repo: HubRepo, access: HubAccess, tmp_path: Path) -> None:
    repo.commit({**SMALL_MODEL, **PICKLES, **ONE_PICKLE})
    plan = hub_functions.plan(NAME, tmp_path, access, allow_pickle=True)
    assert {file.path for file in plan.files} == SMALL_MODEL.keys()
    assert {file.path for file in plan.skipped} == {
        name for name in (*PICKLES, *ONE_PICKLE) if ".bin" in name
    }
    assert {file.reason for file in plan.skipped} == {SkipReason.PICKLE}


def test_an_index_that_names_what_the_repository_lacks(
    repo: HubRepo, access: HubAccess, tmp_path: Path
) -> None:
    shard = "pytorch_model-2-of-2.bin"
    repo.commit({name: content for name, content in PICKLES.items() if name != shard})
    with pytest.raises(ModelUnsupportedError, match=r"pytorch_model\.bin\.index\.json names"):
        hub_functions.plan(NAME, tmp_path, access, allow_pickle=True)
    assert not RepoFolder(tmp_path, "org/model").path.exists()
