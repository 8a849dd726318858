"""What came of a file before its download broke off is not fetched again, unless it is wrong."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from loaderd.server.errors import DownloadInterruptedError, SnapshotCorruptError
from loaderd.server.store.store import DownloadProgress, ModelStore
from tests.faults.store.support import (
    MODEL,
    NEEDED,
    WEIGHTS,
    children,
    contents,
    download,
    litter,
    partial_files,
    plan,
    ranges,
    settings,
)
from tests.hub import Hub, Response, faults
from tests.unit.store.caches import write_folder

CONTENT = MODEL["model.safetensors"]
PARTIAL = f"models--org--model/blobs/{hashlib.sha256(CONTENT).hexdigest()}.incomplete"
LEFT = CONTENT[:1_234_567]


async def finish(store: ModelStore) -> DownloadProgress:
    """Downloads; the last progress, when all is as it should be."""
    seen: list[DownloadProgress] = []
    snapshot = await download(store, on_progress=seen.append)
    assert contents(snapshot.path) == {name: MODEL[name] for name in NEEDED}
    cache = store.settings.cache_dir
    assert partial_files(cache) == litter(cache) == []
    assert seen[-1].downloaded_bytes == seen[-1].total_bytes
    assert seen[-1].completed_files == len(NEEDED)
    assert seen[-1].files == ()
    return seen[-1]


async def test_a_killed_download_is_gone_on_from_by_the_next_daemon(
    store: ModelStore, hub: Hub, cache: Path
) -> None:
    hub.inject(faults.hang(after_bytes=2_200_000), path=WEIGHTS, times=1)
    seen: list[DownloadProgress] = []

    def look(progress: DownloadProgress) -> None:
        seen.append(progress)
        if progress.downloaded_bytes > 2_000_000:
            children()[0].kill()

    with pytest.raises(DownloadInterruptedError):
        await download(store, on_progress=look)
    (current,) = seen[-1].files
    assert (current.path, current.size_bytes) == ("model.safetensors", len(CONTENT))
    assert current.downloaded_bytes > 1_900_000
    (partial,) = partial_files(cache)
    came = partial.stat().st_size
    assert partial.read_bytes() == CONTENT[:came]
    assert [p.name for p in (cache / "models--org--model/snapshots").rglob("*.safetensors")] == []

    planned = await plan(store)
    assert [file.partial_bytes for file in planned.files if not file.cached] == [came]
    assert planned.missing_bytes == len(CONTENT) - came
    next_store = ModelStore(settings(hub, cache))
    await next_store.start()
    last = await finish(next_store)
    await next_store.close()
    assert (last.resumed_bytes, last.refetched_bytes) == (came, 0)
    assert ranges(hub) == [None, f"bytes={came}-"]


async def test_progress_never_falls_behind_what_was_there(store: ModelStore, cache: Path) -> None:
    write_folder(cache, {PARTIAL: LEFT})
    seen: list[int] = []
    await download(store, on_progress=lambda p: seen.append(p.downloaded_bytes))
    assert seen[0] >= len(LEFT)
    assert seen == sorted(seen)


async def test_a_file_that_lacks_only_its_name_needs_no_request(
    store: ModelStore, hub: Hub, cache: Path
) -> None:
    write_folder(cache, {PARTIAL: CONTENT})
    assert (await finish(store)).resumed_bytes == len(CONTENT)
    assert ranges(hub) == []


async def test_a_hub_that_sends_all_when_asked_for_a_part(
    store: ModelStore, hub: Hub, cache: Path
) -> None:
    def all_of_it(response: Response, _stopped: threading.Event) -> Response:
        kept = {k: v for k, v in response.headers.items() if k != "Content-Range"}
        return Response(200, {**kept, "Content-Length": str(len(CONTENT))}, [CONTENT])

    write_folder(cache, {PARTIAL: LEFT})
    hub.inject(all_of_it, path=WEIGHTS)
    last = await finish(store)
    assert (last.resumed_bytes, last.refetched_bytes) == (0, len(LEFT))
    assert ranges(hub) == [f"bytes={len(LEFT)}-"]


async def test_a_hub_that_refuses_parts(store: ModelStore, hub: Hub, cache: Path) -> None:
    def refuse(response: Response, _stopped: threading.Event) -> Response:
        return response if response.status == 200 else Response(416, {"Content-Length": "0"})

    write_folder(cache, {PARTIAL: LEFT})
    hub.inject(refuse, path=WEIGHTS)
    last = await finish(store)
    assert (last.resumed_bytes, last.refetched_bytes) == (0, len(LEFT))
    assert ranges(hub) == [f"bytes={len(LEFT)}-", None]


async def test_what_was_left_and_is_wrong_is_fetched_again(
    store: ModelStore, hub: Hub, cache: Path
) -> None:
    write_folder(cache, {PARTIAL: b"\xff" * len(LEFT)})
    last = await finish(store)
    # The rest came well, but could not be told from what was wrong.
    assert (last.resumed_bytes, last.refetched_bytes) == (0, len(CONTENT))
    assert ranges(hub) == [f"bytes={len(LEFT)}-", None]


async def test_what_was_left_and_is_too_long_is_not_used(
    store: ModelStore, hub: Hub, cache: Path
) -> None:
    write_folder(cache, {PARTIAL: CONTENT + b"more"})
    assert (await finish(store)).resumed_bytes == 0
    assert ranges(hub) == [None]


async def test_a_hub_that_sends_wrong_bytes_is_believed_no_better_the_second_time(
    store: ModelStore, hub: Hub, cache: Path
) -> None:
    write_folder(cache, {PARTIAL: LEFT})
    hub.inject(faults.wrong_bytes(offset=1000), path=WEIGHTS)
    with pytest.raises(SnapshotCorruptError):
        await download(store)
    assert ranges(hub) == [f"bytes={len(LEFT)}-", None]
    assert partial_files(cache) == litter(cache) == []
    hub.heal()
    await finish(store)


async def test_a_line_that_breaks_again_and_again_is_borne_while_bytes_come(
    store: ModelStore, hub: Hub
) -> None:
    def slow_then_cut(response: Response, stopped: threading.Event) -> Response:
        # A reset loses what has not been read yet, so there is time to read.
        waits = faults.hang(after_bytes=499_999, seconds=0.2)(response, stopped)
        return faults.reset(after_bytes=500_000)(waits, stopped)

    hub.inject(slow_then_cut, path=WEIGHTS)
    last = await finish(store)
    assert (last.resumed_bytes, last.refetched_bytes) == (0, 0)
    asked = ranges(hub)
    assert len(asked) > store.settings.retry.attempts
    assert len(set(asked)) == len(asked)


async def test_a_hub_that_starts_from_the_beginning_each_time_is_given_up(
    store: ModelStore, hub: Hub, cache: Path
) -> None:
    def first_half(response: Response, stopped: threading.Event) -> Response:
        kept = {k: v for k, v in response.headers.items() if k != "Content-Range"}
        whole = Response(200, {**kept, "Content-Length": str(len(CONTENT))}, [CONTENT])
        return faults.short_body(after_bytes=1_500_000)(whole, stopped)

    hub.inject(first_half, path=WEIGHTS)
    async with asyncio.timeout(20):
        with pytest.raises(Exception, match="could not be reached"):
            await download(store)
    assert len(ranges(hub)) <= 2 * store.settings.retry.attempts
    hub.heal()
    await finish(store)


async def test_a_body_of_unknown_length_that_ends_early_is_gone_on_with(
    store: ModelStore, hub: Hub
) -> None:
    def cut(response: Response, _stopped: threading.Event) -> Response:
        kept = {k: v for k, v in response.headers.items() if k != "Content-Length"}
        return replace(response, headers={**kept, "Connection": "close"}, body=[LEFT])

    hub.inject(cut, path=WEIGHTS, times=1)
    await finish(store)
    assert ranges(hub) == [None, f"bytes={len(LEFT)}-"]
