"""A damaged cache: what is needed is fetched again, or an error names the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loaderd.server.errors import (
    HubUnreachableError,
    LoaderdError,
    SnapshotCorruptError,
    SnapshotIncompleteError,
)
from loaderd.server.store.names import HubName
from loaderd.server.store.store import CachedSnapshot, ModelStore, NotCached
from tests.faults.store.support import (
    MODEL,
    NAME,
    NEEDED,
    WEIGHTS,
    contents,
    download,
    gets,
    listed,
    plan,
    settings,
)
from tests.hub import Hub, faults

FILE = "model.safetensors"

Damage = Callable[[Path], None]


def _cut(pointer: Path) -> None:
    blob = pointer.resolve()
    blob.write_bytes(blob.read_bytes()[:1000])


def _overwrite_header(pointer: Path) -> None:
    blob = pointer.resolve()
    blob.write_bytes(b"\0" * 100 + blob.read_bytes()[100:])


def _delete_blob(pointer: Path) -> None:
    pointer.resolve().unlink()


def _delete_link(pointer: Path) -> None:
    pointer.unlink()


def _link_to_another_blob(pointer: Path) -> None:
    pointer.unlink()
    pointer.symlink_to((pointer.parent / "config.json").readlink())


def _link_out_of_the_cache(pointer: Path) -> None:
    outside = pointer.parents[4] / pointer.readlink().name
    pointer.resolve().rename(outside)
    pointer.unlink()
    pointer.symlink_to(outside)


def _share_a_damaged_blob(pointer: Path) -> None:
    """The library keeps Xet blobs in a store for all repositories, behind a second link."""
    blob = pointer.resolve()
    shared = pointer.parents[3] / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    (pointer.parents[3] / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    blob.rename(shared)
    blob.symlink_to(shared)
    shared.write_bytes(b"short")


DAMAGES: dict[str, tuple[Damage, type[LoaderdError], int]] = {
    "cut": (_cut, SnapshotCorruptError, 1),
    "header": (_overwrite_header, SnapshotCorruptError, 1),
    "no blob": (_delete_blob, SnapshotIncompleteError, 1),
    # The blob of these is whole, and only needs its link.
    "no link": (_delete_link, SnapshotIncompleteError, 0),
    "other blob": (_link_to_another_blob, SnapshotCorruptError, 0),
    "link outside": (_link_out_of_the_cache, SnapshotCorruptError, 1),
    "shared blob": (_share_a_damaged_blob, SnapshotCorruptError, 1),
}


@pytest.mark.parametrize(("damage", "error", "fetched"), DAMAGES.values(), ids=DAMAGES)
async def test_what_is_damaged_is_fetched_again_and_nothing_else(
    store: ModelStore, hub: Hub, damage: Damage, error: type[LoaderdError], fetched: int
) -> None:
    snapshot = await download(store)
    damage(snapshot.path / FILE)

    broken = await store.resolve(NAME)
    assert isinstance(broken, NotCached)
    assert broken.commit == snapshot.commit
    assert type(broken.problem) is error
    assert broken.problem.metadata["file"] == FILE
    (info,) = await listed(store)
    assert not info.complete

    planned = await plan(store)
    assert {file.path for file in planned.files if not file.cached} <= {FILE}
    before = len(gets(hub))
    assert await download(store) == snapshot
    assert len(gets(hub)) == before + fetched
    assert contents(snapshot.path) == {name: MODEL[name] for name in NEEDED}


@pytest.mark.parametrize(("damage", "error"), [d[:2] for d in DAMAGES.values()], ids=DAMAGES)
async def test_offline_the_error_names_the_file(
    store: ModelStore, hub: Hub, cache: Path, damage: Damage, error: type[LoaderdError]
) -> None:
    snapshot = await download(store)
    damage(snapshot.path / FILE)
    asked = len(hub.requests)
    offline = ModelStore(settings(hub, cache, offline=True))
    with pytest.raises(error) as caught:
        await download(offline)
    assert caught.value.metadata["model"] == "org/model"
    assert caught.value.metadata["file"] == FILE
    assert len(hub.requests) == asked


@pytest.mark.parametrize("damage", [d[0] for d in DAMAGES.values()], ids=DAMAGES)
async def test_a_commit_is_checked_too_before_it_is_taken_from_the_cache(
    store: ModelStore, damage: Damage
) -> None:
    snapshot = await download(store)
    damage(snapshot.path / FILE)
    again = await download(store, HubName("org/model", snapshot.commit))
    assert isinstance(again, CachedSnapshot)
    assert contents(again.path) == {name: MODEL[name] for name in NEEDED}


async def test_a_link_to_another_content_of_the_same_size_is_put_right(
    store: ModelStore, hub: Hub
) -> None:
    snapshot = await download(store)
    pointer = snapshot.path / FILE
    other = pointer.parents[2] / "blobs" / ("0" * 64)
    other.write_bytes(MODEL[FILE][:-1] + b"\0")
    pointer.unlink()
    pointer.symlink_to(f"../../blobs/{other.name}")
    await download(store)
    assert contents(snapshot.path) == {name: MODEL[name] for name in NEEDED}
    assert gets(hub) == sorted(NEEDED)  # the right blob was still there


@pytest.mark.parametrize(("damage", "error"), [d[:2] for d in DAMAGES.values()], ids=DAMAGES)
async def test_damage_is_told_as_damage_also_while_the_hub_is_gone(
    store: ModelStore, hub: Hub, damage: Damage, error: type[LoaderdError]
) -> None:
    snapshot = await download(store)
    damage(snapshot.path / FILE)
    hub.stop()
    with pytest.raises(error) as caught:
        await download(store)
    assert caught.value.metadata["file"] == FILE


async def test_what_never_was_whole_waits_for_the_hub(store: ModelStore, hub: Hub) -> None:
    hub.inject(faults.reset(after_bytes=0), path=WEIGHTS)
    for _ in range(2):
        with pytest.raises(HubUnreachableError):
            await download(store)
