"""Plans of loads, and what they are against what loads take."""

from __future__ import annotations

import pytest

from loaderd.client import AsyncClient, Dtype, errors
from tests.contract.backend import Backend


async def test_a_plan_says_where_a_model_would_go_and_loads_nothing(
    client: AsyncClient, backend: Backend
) -> None:
    plan = await client.plan(backend.model, device_map="cpu")

    assert plan.fits
    assert [device.id for device in plan.devices] == ["cpu"]
    assert sum(device.bytes for device in plan.devices) == plan.needed_bytes
    assert 0 < plan.breakdown.weights_bytes < plan.needed_bytes <= plan.free_bytes
    assert plan.breakdown.kv_cache_bytes > 0
    assert 0 < plan.kv_tokens <= 4096
    assert plan.unknown == ()
    assert plan.dtype_reason
    assert plan.holders == ()
    assert await client.models() == []


async def test_a_plan_is_for_the_dtype_that_is_asked_for(
    client: AsyncClient, backend: Backend
) -> None:
    plan = await client.plan(backend.model, dtype="float32", device_map="cpu")

    assert plan.dtype is Dtype.FLOAT32
    assert plan.dtype_reason == "asked for"


async def test_a_plan_of_what_is_not_cached_says_so(client: AsyncClient, backend: Backend) -> None:
    with pytest.raises(errors.SnapshotNotFoundError):
        await client.plan(backend.uncached)


async def test_a_plan_refuses_what_a_load_refuses(client: AsyncClient, backend: Backend) -> None:
    with pytest.raises(errors.InvalidArgumentError):
        await client.plan(backend.model, device_map="the moon")
    with pytest.raises(errors.UnsupportedOptionError):
        await client.plan(backend.model, device_map="cuda:7")


async def test_a_loaded_model_holds_memory_until_it_is_unloaded(
    client: AsyncClient, backend: Backend
) -> None:
    model = await client.load(backend.model, device_map="cpu")

    assert model.details is not None
    assert model.details.planned_bytes > 0
    assert model.details.memory_bytes > 0
    cpu = (await client.devices())[-1]
    assert [holder.model_id for holder in cpu.holders] == [model.id]
    assert cpu.reserved_bytes == sum(holder.bytes for holder in cpu.holders) > 0
    assert (await client.plan(backend.model, device_map="cpu")).holders == cpu.holders
    await model.unload()
    cpu = (await client.devices())[-1]
    assert (cpu.reserved_bytes, cpu.holders) == (0, ())


async def test_a_plan_counts_every_replica(client: AsyncClient, backend: Backend) -> None:
    one = await client.plan(backend.model, device_map="cpu")
    two = await client.plan(backend.model, device_map="cpu", replicas=2)
    assert two.needed_bytes == sum(device.bytes for device in two.devices)
    assert two.needed_bytes == 2 * one.needed_bytes
    assert two.breakdown.weights_bytes == one.breakdown.weights_bytes
