"""Model files: resolve, download, list."""

from __future__ import annotations

import pytest

from loaderd.client import AsyncClient, DownloadPlan, DownloadProgress, Snapshot, errors
from tests.contract.backend import Backend


async def test_resolve_finds_a_snapshot(client: AsyncClient, backend: Backend) -> None:
    resolution = await client.cache.resolve(backend.model)

    assert isinstance(resolution, Snapshot)
    assert resolution.repo_id == backend.model
    assert resolution.complete
    assert len(resolution.commit) == 40
    assert await client.cache.resolve(f"{backend.model}@{resolution.commit}") == resolution


async def test_snapshots_lists_it(client: AsyncClient, backend: Backend) -> None:
    snapshots = await client.cache.snapshots()

    snapshot = next(s for s in snapshots if s.repo_id == backend.model)
    assert snapshot.complete
    assert snapshot.file_count > 0
    assert 0 < snapshot.size_bytes <= snapshots.total_bytes
    assert snapshot.revision in {*snapshot.refs, snapshot.commit}
    assert snapshot.modified_at is not None
    assert snapshots[0].repo_id == min(s.repo_id for s in snapshots)


async def test_what_is_not_there_can_be_planned_and_downloaded(
    client: AsyncClient, backend: Backend
) -> None:
    plan = await client.cache.resolve(backend.uncached)
    assert isinstance(plan, DownloadPlan)
    assert plan.repo_id == backend.uncached
    assert plan.total_bytes == sum(file.size_bytes for file in plan.files)
    assert plan.missing_bytes == sum(file.size_bytes for file in plan.files if not file.cached)
    seen: list[DownloadProgress] = []

    snapshot = await client.cache.download(backend.uncached, on_progress=seen.append)

    assert snapshot.complete
    assert (snapshot.repo_id, snapshot.commit) == (plan.repo_id, plan.commit)
    assert seen
    downloaded = [progress.downloaded_bytes for progress in seen]
    assert downloaded == sorted(downloaded)
    assert all(p.total_bytes is None or p.downloaded_bytes <= p.total_bytes for p in seen)
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
