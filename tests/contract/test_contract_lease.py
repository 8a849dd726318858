"""Keep-alives, pins and leases."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from loaderd.client import AsyncClient, AsyncModel, ChangeReason, ModelList, ModelState, errors
from tests.contract.backend import Backend

PROMPT = "Once upon a time"


async def test_a_model_says_how_long_it_stays(client: AsyncClient, backend: Backend) -> None:
    model = await client.load(backend.model, keep_alive=600)

    now = datetime.now(UTC)
    assert model.info.keep_alive == timedelta(minutes=10)
    assert model.info.expires_at is not None
    assert timedelta(minutes=9) < model.info.expires_at - now < timedelta(minutes=11)
    assert model.info.last_used_at is not None
    assert model.info.active_leases == 0


async def test_a_keep_alive_is_no_part_of_what_a_model_is(
    client: AsyncClient, backend: Backend
) -> None:
    first = await client.load(backend.model, keep_alive=timedelta(minutes=10))
    second = await client.load(backend.model)
    third = await client.load(backend.model, keep_alive=20)

    assert first.id == second.id == third.id
    assert second.info.keep_alive == timedelta(minutes=10)
    assert third.info.keep_alive == timedelta(seconds=20)


async def test_a_negative_keep_alive_pins(client: AsyncClient, backend: Backend) -> None:
    model = await client.load(backend.model, keep_alive=-1)

    assert model.info.keep_alive < timedelta()
    assert model.info.expires_at is None


async def test_a_request_sets_the_keep_alive(model: AsyncModel) -> None:
    await model.generate(PROMPT, max_new_tokens=1, keep_alive=1234)

    assert (await model.refresh()).keep_alive == timedelta(seconds=1234)


async def test_a_lease_holds_a_model_until_it_is_released(
    client: AsyncClient, model: AsyncModel
) -> None:
    lease = await model.lease(60)

    assert lease.model.id == model.id == lease.info.model_id
    assert lease.info.ttl == timedelta(minutes=1)
    assert (await model.refresh()).active_leases == 1
    assert model.info.expires_at is None or model.info.expires_at >= lease.info.expires_at
    with pytest.raises(errors.ModelInUseError) as caught:
        await client.unload(model.name)
    assert (caught.value.active_requests, caught.value.active_leases) == (0, 1)
    await lease.release()
    assert (await model.refresh()).active_leases == 0
    await client.unload(model.name)


async def test_a_model_is_loaded_and_held_at_once(client: AsyncClient, backend: Backend) -> None:
    async with await client.lease(backend.model, timedelta(minutes=1)) as lease:
        result = await lease.model.generate(PROMPT, max_new_tokens=2)
        assert result.usage.generated_tokens == 2
        assert (await lease.model.refresh()).active_leases == 1
    assert (await lease.model.refresh()).active_leases == 0


async def test_a_lease_is_renewed(model: AsyncModel) -> None:
    lease = await model.lease(60)
    before = lease.info.expires_at

    info = await lease.renew()

    assert info == lease.info
    assert info.expires_at >= before
    assert info.id == lease.id


async def test_a_lease_that_has_ended_is_not_found(model: AsyncModel) -> None:
    lease = await model.lease(60)
    await lease.release()

    with pytest.raises(errors.LeaseNotFoundError) as caught:
        await lease.release()
    assert caught.value.lease == lease.id
    with pytest.raises(errors.LeaseNotFoundError):
        await lease.renew()
    with pytest.raises(errors.LeaseNotFoundError):
        await lease.model.generate(PROMPT, max_new_tokens=1)
    async with lease:
        pass  # leaving it says nothing of a lease that is gone


@pytest.mark.parametrize("ttl", [0, -5, 100_000])
async def test_a_lease_has_bounds(model: AsyncModel, ttl: float) -> None:
    with pytest.raises(errors.InvalidArgumentError) as caught:
        await model.lease(ttl)
    assert caught.value.field == "ttl"


async def test_force_ends_leases(client: AsyncClient, model: AsyncModel) -> None:
    lease = await model.lease(60)

    await client.unload(model.id, force=True, grace=5)

    with pytest.raises(errors.LeaseNotFoundError):
        await lease.renew()


async def test_grace_goes_with_force(client: AsyncClient, model: AsyncModel) -> None:
    with pytest.raises(errors.InvalidArgumentError) as caught:
        await client.unload(model.id, grace=5)
    assert caught.value.field == "grace"
    assert len(await client.models()) == 1


async def test_changes_have_reasons(client: AsyncClient, backend: Backend) -> None:
    for model in await client.models():  # of tests before
        await model.unload(force=True)
    async with client.watch() as watch:
        updates = aiter(watch)
        assert isinstance(await anext(updates), ModelList)
        model = await client.load(backend.model)
        await model.unload()
        reasons: list[ChangeReason] = []
        async for event in updates:
            assert not isinstance(event, ModelList)
            reasons.append(event.reason)
            if event.model.state is ModelState.UNLOADED:
                break
    assert set(reasons) == {ChangeReason.LOAD, ChangeReason.UNLOAD}
    assert reasons == sorted(reasons)
