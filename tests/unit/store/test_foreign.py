"""What others put into a cache, or keep for themselves, hides and breaks no more than itself."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from loaderd.server.errors import CacheNotWritableError
from loaderd.server.store import records
from loaderd.server.store.cache import RepoFolder
from loaderd.server.store.deletion import PrunePolicy
from loaderd.server.store.keeper import Keeper, Target
from loaderd.server.store.names import HubName
from loaderd.server.store.scan import describe
from loaderd.server.store.store import CachedSnapshot, ModelStore, NotCached, StoreSettings
from tests.unit.store.caches import (
    COMMIT,
    OTHER_COMMIT,
    SMALL_MODEL,
    MadeUpRepo,
    made_up_repo,
    safetensors,
    scan,
)

ORPHANS = PrunePolicy(orphans=True)
LAST = datetime(9999, 12, 31, tzinfo=UTC)


@pytest.fixture
def repo(tmp_path: Path) -> MadeUpRepo:
    repo = made_up_repo(tmp_path)
    repo.add(SMALL_MODEL, listing=SMALL_MODEL)
    return repo


@pytest.fixture
def cache(repo: MadeUpRepo) -> Path:
    return repo.folder.cache_dir


def pipe_for(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def write_use(repo: MadeUpRepo, when: str) -> None:
    record = {"format_version": 1, "used": {COMMIT: when}, "complete": {}}
    records.path_of(repo.folder).write_text(json.dumps(record))


CONTENT: dict[str, Callable[[MadeUpRepo], object]] = {
    "deep listing": lambda repo: repo.folder.tree(COMMIT).write_text("[" * 200_000),
    "endless listing": lambda repo: os.truncate(repo.folder.tree(COMMIT), 1 << 40),
    "pipe for a listing": lambda repo: pipe_for(repo.folder.tree(COMMIT)),
    "pipe for a ref": lambda repo: pipe_for(repo.folder.path / "refs" / "v1"),
    "pipe for a record": lambda repo: pipe_for(records.path_of(repo.folder)),
    "use past the end of time": lambda repo: write_use(repo, "9999-12-31T23:59:59-23:59"),
    "use before its begin": lambda repo: write_use(repo, "0001-01-01T00:00:00+23:59"),
    "ref that is no text": lambda repo: Path(
        os.fsdecode(os.fsencode(repo.folder.path / "refs") + b"/\xff")
    ).write_text(COMMIT),
    "refs in 1300 folders": lambda repo: subprocess.run(
        ["mkdir", "-p", str(repo.folder.path / "refs") + "/a" * 1300], check=True
    ),
}


@pytest.fixture
def removed(repo: MadeUpRepo) -> Iterator[None]:
    """Afterwards the repository is gone: Python itself cannot remove everything."""
    yield
    subprocess.run(["rm", "-rf", repo.folder.path], check=True)


@pytest.mark.usefixtures("removed")
@pytest.mark.parametrize("content", CONTENT)
async def test_content_that_no_program_writes(cache: Path, repo: MadeUpRepo, content: str) -> None:
    repo.add(SMALL_MODEL, commit=OTHER_COMMIT, refs=())
    CONTENT[content](repo)
    found = {info.commit: (info.complete, info.refs) for info in scan(cache).snapshots}
    assert found == {COMMIT: (True, ("main",)), OTHER_COMMIT: (True, ())}
    assert describe(repo.folder, COMMIT).complete
    store = ModelStore(StoreSettings(cache, offline=True))
    assert isinstance(await store.resolve(HubName("org/model")), CachedSnapshot)
    await store.delete([Target("org/model", COMMIT)], dry_run=False)
    assert [info.commit for info in scan(cache).snapshots] == [OTHER_COMMIT]


def test_dates_that_no_calendar_has(
    cache: Path, repo: MadeUpRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loaderd.server.store.inventory._with_use", _in_the_year_33658)
    (found,) = scan(cache).snapshots
    assert (found.modified_at, found.last_used_at) == (LAST, LAST)


def test_a_repository_that_cannot_be_listed_hides_no_other(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up_repo(cache, "org/other").add(SMALL_MODEL)

    def fail(repo: RepoFolder) -> dict[str, datetime]:
        if repo.repo_id == "org/other":
            raise RecursionError
        return {}

    monkeypatch.setattr("loaderd.server.store.records.last_used", fail)
    assert [info.repo_id for info in scan(cache).snapshots] == ["org/model"]


def symlinked_commit(repo: MadeUpRepo, _: pytest.MonkeyPatch) -> None:
    moved = repo.folder.path / "moved" / COMMIT
    moved.parent.mkdir()
    repo.folder.snapshot(COMMIT).rename(moved)
    repo.folder.snapshot(COMMIT).symlink_to(moved)


def symlinked_folder(repo: MadeUpRepo, _: pytest.MonkeyPatch) -> None:
    moved = repo.folder.path / "moved"
    repo.folder.snapshot(COMMIT).rename(moved)
    repo.folder.snapshot(COMMIT).mkdir()
    (repo.folder.snapshot(COMMIT) / "inner").symlink_to(moved)


def closed_folder(repo: MadeUpRepo, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as root, whom no mode keeps out."""
    listed = os.scandir

    def refuse(path: str | Path | int) -> object:
        if not isinstance(path, int) and Path(path).name == COMMIT:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr("os.scandir", refuse)


@pytest.mark.parametrize("hide", [symlinked_commit, symlinked_folder, closed_folder])
async def test_contents_of_a_snapshot_that_is_not_read_stay(
    cache: Path,
    repo: MadeUpRepo,
    monkeypatch: pytest.MonkeyPatch,
    hide: Callable[[MadeUpRepo, pytest.MonkeyPatch], None],
) -> None:
    updated = {**SMALL_MODEL, "model.safetensors": safetensors(fill=b"\2")}
    repo.add(updated, commit=OTHER_COMMIT, refs=("next",))
    before = {path.name for path in repo.folder.blobs.iterdir()}
    hide(repo, monkeypatch)
    keeper = Keeper(cache, None)
    assert (await keeper.prune(ORPHANS, dry_run=False)).freed_bytes == 0
    planned = await keeper.delete([Target("org/model", "next")], dry_run=False)
    assert planned.freed_bytes == 0
    assert {path.name for path in repo.folder.blobs.iterdir()} == before
    monkeypatch.undo()
    assert OTHER_COMMIT not in {info.commit for info in scan(cache).snapshots}


async def test_a_link_to_a_folder_is_no_snapshot(
    cache: Path, repo: MadeUpRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    symlinked_commit(repo, monkeypatch)
    store = ModelStore(StoreSettings(cache, offline=True))
    assert isinstance(await store.resolve(HubName("org/model")), NotCached)
    assert scan(cache).snapshots == ()
    with pytest.raises(FileNotFoundError):
        describe(repo.folder, COMMIT)


async def test_a_cache_that_is_not_ours_to_read_is_told(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    store = ModelStore(StoreSettings(cache, offline=True))
    await store.start()
    with pytest.raises(CacheNotWritableError, match="Permission denied"):
        await store.snapshots()
    with pytest.raises(CacheNotWritableError, match="Permission denied"):
        await store.delete([Target("org/model")], dry_run=False)


async def test_a_daemon_starts_on_a_cache_that_it_cannot_sweep(
    cache: Path, repo: MadeUpRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave_over(repo: MadeUpRepo) -> Path:
        partial = repo.folder.blobs / f"{'1' * 64}.0a1b2c3d.incomplete"
        partial.write_bytes(b"12345")
        os.utime(partial, (0, 0))
        trash = repo.folder.path / f"trash-{OTHER_COMMIT}-00000000"
        trash.mkdir()
        return trash

    other = made_up_repo(cache, "org/other")
    other.add(SMALL_MODEL)
    foreign, own = leave_over(repo), leave_over(other)
    removed = shutil.rmtree

    def refuse(path: Path) -> None:
        if path == foreign:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        removed(path)

    monkeypatch.setattr("shutil.rmtree", refuse)
    await ModelStore(StoreSettings(cache, offline=True)).start()
    assert (foreign.exists(), own.exists()) == (True, False)
    assert not list(other.folder.blobs.glob("*.incomplete"))


async def test_a_daemon_starts_where_a_file_is_in_the_locks_place(
    cache: Path, repo: MadeUpRepo
) -> None:
    partial = repo.folder.blobs / f"{'1' * 64}.0a1b2c3d.incomplete"
    partial.write_bytes(b"12345")
    os.utime(partial, (0, 0))
    (cache / ".locks").write_text("")
    store = ModelStore(StoreSettings(cache, offline=True))
    await store.start()
    with pytest.raises(CacheNotWritableError, match=r"\.locks"):
        await store.prune(ORPHANS, dry_run=False)
    assert len((await store.snapshots()).snapshots) == 1


def _in_the_year_33658(state: os.stat_result) -> tuple[float, ...]:
    return (state.st_dev, state.st_ino, state.st_size, state.st_ctime_ns, 1e12, 1e12, 1, 0o100644)
