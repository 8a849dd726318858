"""A hub, or somebody between it and us, that means harm: nothing gets out of the cache."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loaderd.server.errors import (
    DiskFullError,
    HubUnreachableError,
    LoaderdError,
    SnapshotCorruptError,
)
from loaderd.server.store.names import HubName
from loaderd.server.store.store import ModelStore, NotCached
from tests.faults.store.support import (
    INFO,
    MODEL,
    NAME,
    NEEDED,
    TREE,
    WEIGHTS,
    contents,
    download,
    found,
    gets,
    litter,
    partial_files,
    plan,
    settings,
)
from tests.hub import Hub, HubRepo, Response, faults
from tests.hub.faults import Fault
from tests.unit.store.caches import SHARDED_MODEL, index, write_folder

EVIL = "../../../../evil"


@pytest.fixture
def surroundings(cache: Path) -> Iterator[None]:
    """What is around the cache stays as it was."""
    cache.mkdir(parents=True)
    around = [path for path in found(cache.parent.parent, "**/*") if path != cache]
    yield
    now = found(cache.parent.parent, "**/*")
    assert [path for path in now if not path.is_relative_to(cache)] == around


def _sha(answer: dict[str, Any]) -> Any:
    return {**answer, "sha": EVIL}


def _no_sha(answer: dict[str, Any]) -> Any:
    return {**answer, "sha": None}


def _entry(**changes: Any) -> Callable[[list[dict[str, Any]]], Any]:
    return lambda tree: [*tree, {**tree[0], **changes}]


def _lfs(**changes: Any) -> Callable[[list[dict[str, Any]]], Any]:
    def change(tree: list[dict[str, Any]]) -> Any:
        return [{**e, "lfs": {**e["lfs"], **changes}} if "lfs" in e else e for e in tree]

    return change


def _large_files(count: int) -> list[dict[str, Any]]:
    file = {"type": "file", "size": 1 << 60, "oid": "a" * 40}
    return [{**file, "path": f"{number}.md"} for number in range(count)]


CORRUPT: dict[str, tuple[Fault, str]] = {
    "commit": (faults.rewrite(_sha), INFO),
    "no commit": (faults.rewrite(_no_sha), INFO),
    "path up": (faults.rewrite(_entry(path=f"{EVIL}.json")), TREE),
    "absolute path": (faults.rewrite(_entry(path="/tmp/evil.json")), TREE),
    "backslash": (faults.rewrite(_entry(path="..\\evil.json")), TREE),
    "inner path": (faults.rewrite(_entry(path="a/../../evil.json")), TREE),
    "long name": (faults.rewrite(_entry(path="a" * 300 + ".json")), TREE),
    "long name of few characters": (faults.rewrite(_entry(path="\U0001f600" * 75 + ".json")), TREE),
    "long path": (faults.rewrite(_entry(path="a/" * 600 + "a.json")), TREE),
    "half a character": (faults.rewrite(_entry(path="\ud800.md")), TREE),
    "control": (faults.rewrite(_entry(path="a\nb.json")), TREE),
    "blob": (faults.rewrite(_entry(oid=EVIL)), TREE),
    "sha256": (faults.rewrite(_lfs(oid=EVIL)), TREE),
    "negative size": (faults.rewrite(_entry(size=-1)), TREE),
    "endless size": (faults.rewrite(_entry(path="a.md", size=1 << 70)), TREE),
    "endless sizes": (faults.rewrite(lambda tree: [*tree, *_large_files(8)]), TREE),
    "other etag": (faults.alter_headers(x_linked_etag=f'"{"0" * 64}"'), WEIGHTS),
    "header commit": (faults.alter_headers(x_repo_commit=EVIL), WEIGHTS),
    "other commit": (faults.alter_headers(x_repo_commit="0" * 40), WEIGHTS),
    "size": (faults.alter_headers(x_linked_size="7"), WEIGHTS),
    "length": (faults.alter_headers(content_length="7"), WEIGHTS),
}


@pytest.mark.parametrize(("fault", "path"), CORRUPT.values(), ids=CORRUPT)
@pytest.mark.usefixtures("surroundings")
async def test_an_answer_that_no_hub_gives_is_refused(
    store: ModelStore, hub: Hub, cache: Path, fault: Fault, path: str
) -> None:
    hub.inject(fault, path=path)
    with pytest.raises(SnapshotCorruptError) as caught:
        await download(store)
    assert "evil" not in caught.value.found
    assert isinstance(await store.resolve(NAME), NotCached)
    assert partial_files(cache) == litter(cache) == []
    if path != WEIGHTS:  # the listing was refused: nothing was written at all
        assert found(cache, "*") == []
    hub.heal()
    assert contents((await download(store)).path) == {name: MODEL[name] for name in NEEDED}


@pytest.mark.usefixtures("surroundings")
@pytest.mark.parametrize("name", ["etag", "x_linked_etag"])
@pytest.mark.usefixtures("surroundings")
async def test_a_tag_that_is_no_hash_names_nothing(
    store: ModelStore, hub: Hub, cache: Path, name: str
) -> None:
    hub.inject(faults.alter_headers(**{name: f'"{EVIL}"'}), path="*/resolve/*")
    assert contents((await download(store)).path) == {name: MODEL[name] for name in NEEDED}
    assert not any("evil" in path.name for path in found(cache, "**/*"))


async def test_a_part_that_was_not_asked_for_is_refused(store: ModelStore, hub: Hub) -> None:
    hub.inject(faults.reset(after_bytes=2_500_000), path=WEIGHTS, times=1)
    other = f"bytes 0-9/{len(MODEL['model.safetensors'])}"

    def elsewhere(response: Response, _stopped: threading.Event) -> Response:
        if response.status != 206:
            return response
        return replace(response, headers={**response.headers, "Content-Range": other})

    hub.inject(faults.hang(after_bytes=2_400_000, seconds=0.5), path=WEIGHTS, times=1)
    hub.inject(elsewhere, path=WEIGHTS)
    with pytest.raises(SnapshotCorruptError):
        await download(store)


async def test_entries_that_are_no_entries_are_refused(store: ModelStore, hub: Hub) -> None:
    shapes: list[Callable[[Any], Any]] = [
        lambda tree: {"error": "x"},
        lambda tree: [*tree, {"type": "file"}],
        lambda tree: [*tree, None],
        lambda tree: [*tree, {**tree[0], "path": 7}],
        lambda tree: None,
    ]
    for shape in shapes:
        hub.heal()
        hub.inject(faults.rewrite(shape), path=TREE)
        with pytest.raises(LoaderdError) as caught:
            await download(store)
        assert type(caught.value) in {HubUnreachableError, SnapshotCorruptError}


@pytest.mark.parametrize("shard", [f"{EVIL}.safetensors", "/etc/x.safetensors", "a/b.safetensors"])
@pytest.mark.usefixtures("surroundings")
async def test_an_index_that_leads_out_of_the_model_is_refused(
    store: ModelStore, hub: Hub, cache: Path, shard: str
) -> None:
    repo = HubRepo("org/evil")
    repo.commit({**SHARDED_MODEL, "model.safetensors.index.json": index(shard)})
    hub.add(repo)
    with pytest.raises(SnapshotCorruptError) as caught:
        await download(store, HubName("org/evil"))
    assert caught.value.file == "model.safetensors.index.json"
    assert found(cache, "*") == []


async def test_an_index_of_other_content_than_listed_is_refused(
    store: ModelStore, hub: Hub
) -> None:
    repo = HubRepo("org/sharded")
    repo.commit(SHARDED_MODEL)
    hub.add(repo)
    hub.inject(faults.wrong_bytes(), path="*.index.json")
    with pytest.raises(SnapshotCorruptError) as caught:
        await plan(store, HubName("org/sharded"))
    assert caught.value.file == "model.safetensors.index.json"


def _endless(response: Response, _stopped: threading.Event) -> Response:
    kept = {k: v for k, v in response.headers.items() if k != "Content-Length"}
    body = itertools.repeat(b"x" * 65536)
    return replace(response, headers={**kept, "Connection": "close"}, body=body)


async def test_a_body_without_end_is_cut_off(store: ModelStore, hub: Hub, cache: Path) -> None:
    hub.inject(_endless, path=WEIGHTS)
    with pytest.raises(SnapshotCorruptError) as caught:
        await download(store)
    assert (caught.value.file, caught.value.found) == ("model.safetensors", "a longer content")
    assert partial_files(cache) == []
    weights = next(r for r in hub.requests if r.method == "GET" and "model.safe" in r.path)
    assert weights.sent_bytes < 100_000_000


async def test_an_answer_without_end_is_cut_off(store: ModelStore, hub: Hub) -> None:
    hub.inject(_endless, path=INFO)
    with pytest.raises(HubUnreachableError):
        await download(store)
    assert hub.requests[0].sent_bytes < 200_000_000


async def test_a_listing_without_end_is_cut_off(store: ModelStore, hub: Hub) -> None:
    def empty(response: Response, _stopped: threading.Event) -> Response:
        return Response.json([], {"Link": f'<{hub.url}{path}?recursive=true>; rel="next"'})

    path = f"/api/models/org/model/tree/{(await plan(store)).commit}"
    hub.inject(empty, path=TREE)
    with pytest.raises(HubUnreachableError):
        await plan(store)
    assert len(hub.requests) < 1000


async def test_a_model_larger_than_the_disk_is_refused_before_it_starts(
    store: ModelStore, hub: Hub, cache: Path
) -> None:
    hub.inject(faults.rewrite(_lfs(size=1 << 60)), path=TREE)
    with pytest.raises(DiskFullError) as caught:
        await download(store)
    assert caught.value.needed_bytes > 1 << 60
    assert 0 < caught.value.free_bytes < 1 << 60
    assert gets(hub) == []
    assert found(cache, "*") == []


LIES: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "size": _lfs(size=1234),
    "content": _lfs(oid="0" * 64),
    "small file": lambda tree: [{**e, "oid": "0" * 40} for e in tree],
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
async def test_a_commit_that_the_hub_tells_otherwise_now_stays_as_it_is(
    store: ModelStore, hub: Hub, lie: Callable[[list[dict[str, Any]]], Any]
) -> None:
    snapshot = await download(store)
    hub.inject(faults.rewrite(lie), path=TREE)
    with pytest.raises(SnapshotCorruptError):
        await download(store)
    assert await store.resolve(NAME) == snapshot
    assert contents(snapshot.path) == {name: MODEL[name] for name in NEEDED}


# --- the token -----------------------------------------------------------------------------------


@pytest.fixture
def other(repo: HubRepo) -> Iterator[Hub]:
    """Another server that serves the same."""
    with Hub(repo) as other:
        yield other


async def test_files_may_come_from_another_server_but_the_token_does_not_go_there(
    hub: Hub, other: Hub, cache: Path
) -> None:
    def elsewhere(response: Response, _stopped: threading.Event) -> Response:
        kept = {k: v for k, v in response.headers.items() if k.startswith(("X-", "ETag"))}
        return Response(302, {**kept, "Location": other.url + path, "Content-Length": "0"})

    store = ModelStore(settings(hub, cache, hub_token="hf_secret"))
    planned = await plan(store)
    path = f"/org/model/resolve/{planned.commit}/model.safetensors"
    hub.inject(elsewhere, path=WEIGHTS, method="*")
    assert contents((await download(store)).path) == {name: MODEL[name] for name in NEEDED}
    await store.close()
    assert gets(other) == ["model.safetensors"]
    assert {request.token for request in other.requests} == {None}
    assert {request.token for request in hub.requests} == {"hf_secret"}


@pytest.mark.parametrize(
    "lie", [{"X-Linked-Size": "7"}, {"X-Repo-Commit": "0" * 40}, {"X-Linked-Etag": '"' + "0" * 64}]
)
async def test_a_redirect_that_contradicts_the_listing_is_not_followed(
    store: ModelStore, hub: Hub, other: Hub, lie: dict[str, str]
) -> None:
    path = f"/org/model/resolve/{(await plan(store)).commit}/model.safetensors"
    hub.inject(faults.status(302, {"Location": other.url + path, **lie}), path=WEIGHTS)
    with pytest.raises(SnapshotCorruptError):
        await download(store)
    assert other.requests == []


async def test_another_server_that_denies_a_file_does_not_make_the_model_gated(
    store: ModelStore, hub: Hub, other: Hub
) -> None:
    other.inject(faults.status(403), path=WEIGHTS)
    path = f"/org/model/resolve/{(await plan(store)).commit}/model.safetensors"
    hub.inject(faults.status(302, {"Location": other.url + path}), path=WEIGHTS)
    with pytest.raises(HubUnreachableError):
        await download(store)


async def test_a_redirect_within_the_hub_says_nothing_of_the_file(
    store: ModelStore, hub: Hub
) -> None:
    def moved(response: Response, _stopped: threading.Event) -> Response:
        path = "/org/model/resolve/main/model.safetensors"
        headers = {"Location": path, "X-Repo-Commit": commit, "ETag": 'W/"of-the-page"'}
        return Response(307, {**headers, "Content-Length": "0"})

    commit = (await plan(store)).commit
    hub.inject(moved, path=f"*/{commit}/model.safetensors")
    assert contents((await download(store)).path) == {name: MODEL[name] for name in NEEDED}


async def test_a_listing_that_goes_on_elsewhere_does_not_take_the_token_along(
    hub: Hub, other: Hub, cache: Path
) -> None:
    store = ModelStore(settings(hub, cache, hub_token="hf_secret"))
    planned = await plan(store)
    page = f"{other.url}/api/models/org/model/tree/{planned.commit}?recursive=true"
    hub.inject(faults.alter_headers(link=f'<{page}>; rel="next"'), path=TREE)
    assert await plan(store) == planned
    await store.close()
    assert [request.token for request in other.requests] == [None]


async def test_the_way_to_another_box_is_encrypted_or_not_taken(
    store: ModelStore, hub: Hub
) -> None:
    hub.inject(faults.status(302, {"Location": "http://192.0.2.1/model"}), path=WEIGHTS)
    with pytest.raises(HubUnreachableError):
        await download(store)


# --- the child is confined -----------------------------------------------------------------------

_CONFINED = """
import sys
from pathlib import Path
from loaderd.server.store.confine import confine_writing
inside, outside = Path(sys.argv[1]), Path(sys.argv[2])
if not confine_writing([inside]):
    sys.exit(77)
def attempts(folder):
    yield lambda: (folder / "new").write_text("x")
    yield lambda: (folder / "old").write_text("x")
    yield lambda: (folder / "new-folder").mkdir()
    yield lambda: (folder / "link").symlink_to("/")
    yield lambda: (folder / "old").rename(folder / "renamed")
    yield lambda: (folder / "victim").unlink()
for folder in (inside, outside):
    for number, attempt in enumerate(attempts(folder)):
        try:
            attempt()
            print(folder.name, number)
        except PermissionError:
            pass
print((outside / "old").read_text())
"""


def test_the_kernel_keeps_a_confined_process_inside(tmp_path: Path) -> None:
    for folder in (tmp_path / "inside", tmp_path / "outside"):
        folder.mkdir()
        (folder / "old").write_text("readable")
        (folder / "victim").touch()
    done = subprocess.run(
        [sys.executable, "-c", _CONFINED, tmp_path / "inside", tmp_path / "outside"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip("this kernel has no Landlock")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [*(f"inside {n}" for n in range(6)), "readable"]


async def test_a_repository_that_the_operator_moved_to_another_disk_is_written_to(
    store: ModelStore, cache: Path, tmp_path: Path
) -> None:
    moved = write_folder(tmp_path / "other-disk", {"notes.txt": b""})
    write_folder(cache, {"notes.txt": b""})
    (cache / "models--org--model").symlink_to(moved)
    snapshot = await download(store)
    assert contents(snapshot.path) == {name: MODEL[name] for name in NEEDED}
    assert len(found(moved, "blobs/*")) == len(NEEDED)
