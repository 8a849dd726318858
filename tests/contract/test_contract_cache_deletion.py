"""Deleting model files: plans, what is in use, pruning."""

from __future__ import annotations

from datetime import timedelta

import pytest

from loaderd.client import AsyncClient, DownloadPlan, Snapshot, errors
from tests.contract.backend import Backend


async def commits(client: AsyncClient) -> set[tuple[str, str]]:
    """All snapshots of the cache."""
    return {(each.repo_id, each.commit) for each in await client.cache.snapshots()}


async def test_a_plan_deletes_nothing_and_its_execution_what_was_planned(
    client: AsyncClient, backend: Backend
) -> None:
    snapshot = await client.cache.download(backend.uncached)
    total_bytes = (await client.cache.snapshots()).total_bytes

    plan = await client.cache.plan_delete(backend.uncached)

    (planned,) = plan.snapshots
    assert (planned.repo_id, planned.commit) == (snapshot.repo_id, snapshot.commit)
    assert plan.kept == ()
    assert plan.freed_bytes == planned.unique_bytes > 0
    assert (backend.uncached, snapshot.commit) in await commits(client)

    deletion = await plan.execute()

    assert [each.commit for each in deletion.snapshots] == [snapshot.commit]
    assert deletion.freed_bytes == plan.freed_bytes
    assert deletion.remaining_bytes == plan.remaining_bytes
    assert (await client.cache.snapshots()).total_bytes == total_bytes - deletion.freed_bytes
    assert (backend.uncached, snapshot.commit) not in await commits(client)
    assert isinstance(await client.cache.resolve(backend.uncached), DownloadPlan)
    with pytest.raises(errors.SnapshotNotFoundError):
        await plan.execute()


@pytest.mark.parametrize("revision", ["main", "commit"])
async def test_delete_is_the_short_form(
    client: AsyncClient, backend: Backend, revision: str
) -> None:
    snapshot = await client.cache.download(backend.uncached)
    revision = snapshot.commit if revision == "commit" else revision

    deletion = await client.cache.delete(f"{backend.uncached}@{revision}")

    assert [each.commit for each in deletion.snapshots] == [snapshot.commit]
    assert (backend.uncached, snapshot.commit) not in await commits(client)


async def test_a_name_without_a_snapshot_deletes_nothing_of_the_others(
    client: AsyncClient, backend: Backend
) -> None:
    await client.cache.download(backend.uncached)
    before = await commits(client)

    for name in (backend.missing, f"{backend.model}@{'0' * 40}", backend.missing_revision):
        with pytest.raises(errors.SnapshotNotFoundError):
            await client.cache.plan_delete(name)
        with pytest.raises(errors.SnapshotNotFoundError):
            await client.cache.delete(backend.uncached, name)

    assert await commits(client) == before


async def test_what_a_model_uses_is_not_deleted(client: AsyncClient, backend: Backend) -> None:
    model = await client.load(backend.uncached)

    plan = await client.cache.plan_delete(backend.uncached)

    assert plan.snapshots == ()
    assert [each.in_use_by for each in plan.kept] == [(model.id,)]
    assert plan.freed_bytes == 0
    with pytest.raises(errors.SnapshotInUseError) as refused:
        await plan.execute()
    assert refused.value.holders == model.id
    with pytest.raises(errors.SnapshotInUseError):
        await client.cache.delete(backend.uncached, backend.model)
    for name in (backend.uncached, backend.model):
        assert isinstance(await client.cache.resolve(name), Snapshot)

    await model.unload()
    deletion = await plan.execute()

    assert [each.repo_id for each in deletion.snapshots] == [backend.uncached]


@pytest.mark.parametrize("name", ["/", "no slash", ""])
async def test_a_deletion_needs_names(client: AsyncClient, name: str) -> None:
    with pytest.raises(errors.InvalidNameError):
        await client.cache.delete(name)
    with pytest.raises(errors.InvalidArgumentError):
        await client.cache.delete()
    with pytest.raises(errors.InvalidArgumentError):
        await client.cache.plan_delete(*["a/b"] * 1001)


async def test_a_dry_run_of_pruning_tells_and_deletes_nothing(
    client: AsyncClient, backend: Backend
) -> None:
    model = await client.load(backend.uncached)
    before = await commits(client)

    for deletion in (
        await client.cache.prune(unused_for=timedelta(0), dry_run=True),
        await client.cache.prune(max_bytes=0, dry_run=True),
    ):
        assert backend.model in {each.repo_id for each in deletion.snapshots}
        assert backend.uncached not in {each.repo_id for each in deletion.snapshots}
        assert deletion.freed_bytes > 0
    long_unused = await client.cache.prune(unused_for=timedelta(0), dry_run=True)
    everything = await client.cache.prune(unused_for=timedelta(days=100_000), dry_run=True)

    assert [each.in_use_by for each in long_unused.kept] == [(model.id,)]
    assert everything.snapshots == ()
    assert await commits(client) == before


async def test_pruning_takes_what_a_stopped_download_left(
    client: AsyncClient, backend: Backend
) -> None:
    operation = client.cache.start_download(backend.stalled)
    await anext(aiter(operation))
    await client.cache.cancel_download(backend.stalled)
    with pytest.raises(errors.DownloadCancelledError):
        await operation.result()
    before = await commits(client)

    await client.cache.prune(orphans=True)

    assert (await client.cache.snapshots()).orphan_bytes == 0
    assert await commits(client) == before


async def test_pruning_needs_a_condition(client: AsyncClient) -> None:
    with pytest.raises(errors.InvalidArgumentError):
        await client.cache.prune()
    with pytest.raises(errors.InvalidArgumentError):
        await client.cache.prune(dry_run=True)
    with pytest.raises(errors.InvalidArgumentError):
        await client.cache.prune(unused_for=timedelta(seconds=-1))
