"""Model files: resolve, download, cancel, list."""

from __future__ import annotations

import pytest

from loaderd.client import AsyncClient, DownloadPlan, DownloadProgress, Snapshot, errors
from tests.contract.backend import Backend, eventually


async def test_resolve_finds_a_snapshot(client: AsyncClient, backend: Backend) -> None:
    resolution = await client.cache.resolve(backend.model)

    assert isinstance(resolution, Snapshot)
    assert resolution.repo_id == backend.model
    assert resolution.complete
    assert len(resolution.commit) == 40
    assert await client.cache.resolve(f"{backend.model}@{resolution.commit}") == resolution


async def test_resolve_asks_the_hub_again(client: AsyncClient, backend: Backend) -> None:
    cached = await client.cache.resolve(backend.model, refresh=True)
    plan = await client.cache.resolve(backend.uncached, refresh=True)

    assert isinstance(cached, Snapshot)
    assert not cached.stale
    assert cached == await client.cache.resolve(backend.model)
    assert isinstance(plan, DownloadPlan)
    with pytest.raises(errors.ModelNotFoundError):
        await client.cache.resolve(backend.missing, refresh=True)


async def test_snapshots_lists_it(client: AsyncClient, backend: Backend) -> None:
    snapshots = await client.cache.snapshots()

    snapshot = next(s for s in snapshots if s.repo_id == backend.model)
    assert snapshot.complete
    assert snapshot.file_count > 0
    assert 0 < snapshot.size_bytes <= snapshots.total_bytes
    assert snapshot.revision in {*snapshot.refs, snapshot.commit}
    assert snapshot.modified_at is not None
    assert snapshots[0].repo_id == min(s.repo_id for s in snapshots)


async def test_snapshots_tell_of_the_disk(client: AsyncClient, backend: Backend) -> None:
    snapshots = await client.cache.snapshots()

    assert all(0 <= s.unique_bytes <= s.size_bytes for s in snapshots)
    assert 0 < sum(s.unique_bytes for s in snapshots) <= snapshots.total_bytes
    assert snapshots.orphan_bytes >= 0
    assert snapshots.free_bytes > 0
    assert snapshots.max_bytes is None
    assert snapshots.downloads == ()


async def test_snapshots_tell_who_uses_them(client: AsyncClient, backend: Backend) -> None:
    assert all(s.in_use_by == () for s in await client.cache.snapshots())

    model = await client.load(backend.model)

    used = {s.repo_id: s.in_use_by for s in await client.cache.snapshots()}
    assert used[backend.model] == (model.id,)
    await model.unload()
    assert all(s.in_use_by == () for s in await client.cache.snapshots())


async def test_what_is_not_there_can_be_planned_and_downloaded(
    client: AsyncClient, backend: Backend
) -> None:
    plan = await client.cache.resolve(backend.uncached)
    assert isinstance(plan, DownloadPlan)
    assert plan.repo_id == backend.uncached
    assert plan.total_bytes == sum(file.size_bytes for file in plan.files)
    assert plan.missing_bytes == sum(file.size_bytes for file in plan.files if not file.cached)
    assert all(file.partial_bytes == 0 for file in plan.files)
    assert plan.skipped_count == len(plan.skipped)
    assert plan.skipped_bytes == sum(file.size_bytes for file in plan.skipped)
    seen: list[DownloadProgress] = []

    snapshot = await client.cache.download(backend.uncached, on_progress=seen.append)

    assert snapshot.complete
    assert (snapshot.repo_id, snapshot.commit) == (plan.repo_id, plan.commit)
    assert seen
    downloaded = [progress.downloaded_bytes for progress in seen]
    assert downloaded == sorted(downloaded)
    assert all(p.total_bytes is None or p.downloaded_bytes <= p.total_bytes for p in seen)
    planned = {file.path: file.size_bytes for file in plan.files}
    for file in [file for progress in seen for file in progress.files]:
        assert file.size_bytes == planned[file.path]
        assert 0 <= file.downloaded_bytes <= file.size_bytes
    resolved = await client.cache.resolve(backend.uncached)
    assert isinstance(resolved, Snapshot)
    assert resolved.commit == snapshot.commit


async def test_a_started_download_is_iterated_and_then_gives_the_snapshot(
    client: AsyncClient, backend: Backend
) -> None:
    operation = client.cache.start_download(backend.uncached)

    progress = [step async for step in operation]
    snapshot = await operation.result()

    assert progress
    assert snapshot.complete
    assert operation.plan is not None
    assert (operation.plan.repo_id, operation.plan.commit) == (snapshot.repo_id, snapshot.commit)


async def test_a_download_of_what_is_there_is_done_at_once(
    client: AsyncClient, backend: Backend
) -> None:
    first = await client.cache.download(backend.model)
    second = await client.cache.download(backend.model)

    assert (first.repo_id, first.commit) == (second.repo_id, second.commit)


async def test_a_cancelled_download_says_so(client: AsyncClient, backend: Backend) -> None:
    operation = client.cache.start_download(backend.uncached)
    await anext(aiter(operation))

    operation.cancel()

    with pytest.raises(errors.CallCancelledError):
        await operation.result()


async def test_a_download_under_way_is_listed_and_can_be_stopped_for_all(
    client: AsyncClient, backend: Backend
) -> None:
    operations = [client.cache.start_download(backend.stalled) for _ in range(2)]
    for operation in operations:
        await anext(aiter(operation))

    async def both_wait() -> bool:
        downloads = (await client.cache.snapshots()).downloads
        return [(each.model, each.waiters) for each in downloads] == [(backend.stalled, 2)]

    await eventually(both_wait)
    cancelled = await client.cache.cancel_download(backend.stalled)

    assert cancelled.waiters == 2
    assert cancelled.kept_bytes >= 0
    for operation in operations:
        with pytest.raises(errors.DownloadCancelledError):
            await operation.result()
    assert (await client.cache.snapshots()).downloads == ()
    assert (await client.cache.cancel_download(backend.stalled)).waiters == 0


@pytest.mark.parametrize("name", ["/", "no slash"])
async def test_a_cancellation_needs_a_name(client: AsyncClient, name: str) -> None:
    with pytest.raises(errors.InvalidNameError):
        await client.cache.cancel_download(name)


@pytest.mark.parametrize("call", ["resolve", "download"])
async def test_missing_models_and_revisions(
    client: AsyncClient, backend: Backend, call: str
) -> None:
    ask = getattr(client.cache, call)

    with pytest.raises(errors.ModelNotFoundError):
        await ask(backend.missing)
    with pytest.raises(errors.RevisionNotFoundError):
        await ask(backend.missing_revision)
    with pytest.raises(errors.InvalidNameError):
        await ask("no slash")


async def test_a_local_path_cannot_be_downloaded(client: AsyncClient) -> None:
    with pytest.raises(errors.InvalidNameError):
        await client.cache.download("/")
