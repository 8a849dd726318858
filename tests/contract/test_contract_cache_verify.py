"""Verifying snapshots that are as they should be; tests/faults has the others."""

from __future__ import annotations

import pytest

from loaderd.client import AsyncClient, VerifyProgress, VerifyUpdate, errors
from tests.contract.backend import Backend


@pytest.mark.parametrize("repair", [False, True])
async def test_a_sound_snapshot_has_no_problems(
    client: AsyncClient, backend: Backend, repair: bool
) -> None:
    seen: list[VerifyUpdate] = []

    report = await client.cache.verify(backend.model, repair=repair, on_progress=seen.append)

    assert report.ok
    assert (report.problems, report.repaired, report.unverifiable_files) == ((), False, ())
    assert report.snapshot.repo_id == backend.model
    assert report.verified_files == report.snapshot.file_count
    assert report.verified_bytes == report.snapshot.size_bytes
    progress = [update for update in seen if isinstance(update, VerifyProgress)]
    assert progress == seen
    verified = [each.verified_bytes for each in progress]
    assert verified == sorted(verified)
    assert all(each.verified_bytes <= each.total_bytes for each in progress)
    assert {each.total_files for each in progress} == {report.verified_files}


async def test_a_started_verification_is_iterated_and_then_gives_the_report(
    client: AsyncClient, backend: Backend
) -> None:
    snapshot = await client.cache.download(backend.uncached)
    operation = client.cache.start_verify(f"{backend.uncached}@{snapshot.commit}")

    progress = [update async for update in operation]
    report = await operation.result()

    assert progress
    assert report.ok
    assert report.snapshot.commit == snapshot.commit


async def test_a_verification_needs_a_snapshot(client: AsyncClient, backend: Backend) -> None:
    for name in (backend.uncached, backend.missing, backend.missing_revision):
        with pytest.raises(errors.SnapshotNotFoundError):
            await client.cache.verify(name)
    for name in ("/", "no slash"):
        with pytest.raises(errors.InvalidNameError):
            await client.cache.verify(name)
