"""Watching models, and the daemon itself."""

from __future__ import annotations

import pytest

from loaderd.client import (
    AsyncClient,
    AsyncModel,
    DeviceType,
    HealthStatus,
    ModelEvent,
    ModelList,
    ModelState,
    errors,
)
from tests.contract.backend import Backend, eventually


async def test_a_watch_begins_with_what_is_there(client: AsyncClient, model: AsyncModel) -> None:
    async with client.watch() as watch:
        first = await anext(aiter(watch))

    assert isinstance(first, ModelList)
    assert [info.id for info in first] == [model.id]
    assert first[0].state is ModelState.READY


async def test_a_watch_sees_every_change(client: AsyncClient, backend: Backend) -> None:
    async with client.watch() as watch:
        first = await anext(aiter(watch))
        assert isinstance(first, ModelList)
        assert len(first) == 0

        model = await client.load(backend.model)
        await model.unload()
        events: list[ModelEvent] = []
        async for update in watch:
            assert isinstance(update, ModelEvent)
            events.append(update)
            if update.model.state is ModelState.UNLOADED:
                break

    assert {event.model.id for event in events} == {model.id}
    states = [event.model.state for event in events]
    assert states == [
        ModelState.RESOLVING,
        ModelState.LOADING,
        ModelState.READY,
        ModelState.UNLOADING,
        ModelState.UNLOADED,
    ]
    assert [event.previous_state for event in events] == [ModelState.UNSPECIFIED, *states[:-1]]
    sequences = [event.sequence for event in events]
    assert sequences == list(range(sequences[0], sequences[0] + len(sequences)))


async def test_a_cancelled_watch_says_so(client: AsyncClient) -> None:
    watch = client.watch()
    await anext(aiter(watch))

    watch.cancel()

    with pytest.raises(errors.CallCancelledError):
        await anext(aiter(watch))


async def test_a_model_tells_what_its_engine_has_done(
    client: AsyncClient, model: AsyncModel
) -> None:
    before = (await model.refresh()).statistics
    result = await model.generate("Hello", max_new_tokens=5, ignore_eos=True)

    async def is_told() -> bool:
        after = (await model.refresh()).statistics
        assert before is not None
        assert after is not None
        grown = after.generated_tokens - before.generated_tokens
        taken = after.prompt_tokens - before.prompt_tokens
        return (grown, taken, after.running_requests) == (5, result.usage.prompt_tokens, 0)

    await eventually(is_told)
    assert model.info.statistics is not None
    assert (model.info.statistics.kv_capacity_tokens or 0) > 0
    assert (await client.info()).clients >= 1


async def test_the_daemon_tells_about_itself(client: AsyncClient) -> None:
    first, second = await client.info(), await client.info()

    assert first.version
    assert first.pid == second.pid
    assert first.uptime <= second.uptime
    assert first.started_at == second.started_at
    assert first.cache_dir
    assert first.hub_endpoint.startswith("http")
    assert not first.draining


async def test_the_cpu_is_the_last_device(client: AsyncClient) -> None:
    *accelerators, cpu = await client.devices()

    assert cpu.id == "cpu"
    assert cpu.type is DeviceType.CPU
    assert cpu.cores is not None
    assert 0 < cpu.free_bytes <= cpu.total_bytes
    assert all(device.type is not DeviceType.CPU for device in accelerators)
    assert all(device.cores is None for device in accelerators)
    assert cpu.available_bytes <= cpu.free_bytes


async def test_health_of_daemon_services_and_models(client: AsyncClient, backend: Backend) -> None:
    assert await client.health() is HealthStatus.SERVING
    assert await client.health("loaderd.v1.ModelService") is HealthStatus.SERVING
    assert await client.health("no.such.Service") is HealthStatus.SERVICE_UNKNOWN

    model = await client.load(backend.model)

    async def health_is(status: HealthStatus) -> None:
        async def condition() -> bool:
            return await client.health(backend.model) is status

        await eventually(condition)

    await health_is(HealthStatus.SERVING)
    await model.unload()
    await health_is(HealthStatus.NOT_SERVING)
