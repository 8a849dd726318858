"""Loading, finding and unloading models."""

from __future__ import annotations

import asyncio
import inspect

import pytest
from grpc import StatusCode

from loaderd.client import (
    AsyncClient,
    AsyncModel,
    Dtype,
    LoadProgress,
    ModelState,
    Offload,
    errors,
)
from tests.contract.backend import Backend, eventually

LOADING_STATES = [ModelState.RESOLVING, ModelState.DOWNLOADING, ModelState.LOADING]


async def test_load_gives_a_ready_model(client: AsyncClient, backend: Backend) -> None:
    model = await client.load(backend.model)

    assert model.name == backend.model
    assert model.state is ModelState.READY
    assert model.info.repo_id == backend.model
    assert model.info.failure is None
    assert model.info.ready_at is not None
    assert model.info.created_at is not None
    assert model.info.created_at <= model.info.ready_at
    assert model.info.timings.total is not None
    assert model.details is not None
    assert model.details.dtype is not Dtype.UNSPECIFIED
    assert model.details.dtype_reason
    assert model.details.weight_bytes > 0
    assert model.details.has_chat_template


async def test_options_that_are_left_out_stay_unset(model: AsyncModel) -> None:
    assert model.info.options.dtype is None
    assert model.info.options.device_map is None
    assert model.info.options.quantization is None
    assert model.details is not None
    assert model.details.quantization is None


async def test_models_are_found_by_name_and_id(client: AsyncClient, model: AsyncModel) -> None:
    assert (await client.model(model.name)).id == model.id
    assert (await client.model(model.id)).name == model.name
    assert [listed.id for listed in await client.models()] == [model.id]


async def test_the_same_load_again_gives_the_same_model(
    client: AsyncClient, backend: Backend, model: AsyncModel
) -> None:
    again = await client.load(backend.model)

    assert again.id == model.id
    assert len(await client.models()) == 1


async def test_other_options_are_another_model(
    client: AsyncClient, backend: Backend, model: AsyncModel
) -> None:
    second = await client.load(backend.model, dtype="float32", device_map="cpu")

    assert second.id != model.id
    with pytest.raises(errors.InvalidArgumentError) as caught:  # which of the two?
        await client.unload(backend.model)
    assert caught.value.field == "model"


async def test_unload_gives_memory_back_and_forgets_the_model(
    client: AsyncClient, model: AsyncModel
) -> None:
    result = await model.unload()

    assert result.freed_bytes > 0
    assert result.model.state is ModelState.UNLOADED
    assert model.state is ModelState.UNLOADED
    assert await client.models() == []
    with pytest.raises(errors.ModelNotLoadedError) as caught:
        await model.unload()
    assert caught.value.code is StatusCode.FAILED_PRECONDITION
    assert caught.value.model


async def test_load_reports_progress_in_order(client: AsyncClient, backend: Backend) -> None:
    seen: list[LoadProgress] = []

    model = await client.load(backend.model, on_progress=seen.append)

    assert seen
    assert {progress.model_id for progress in seen} == {model.id}
    order = [LOADING_STATES.index(progress.state) for progress in seen]
    assert order == sorted(order)
    elapsed = [progress.elapsed for progress in seen]
    assert elapsed == sorted(elapsed)


async def test_a_started_load_is_iterated_and_then_gives_the_model(
    client: AsyncClient, backend: Backend
) -> None:
    operation = client.start_load(backend.model)

    states = [progress.state async for progress in operation]
    model = await operation.result()

    assert states
    assert model.state is ModelState.READY
    assert (await operation.result()).id == model.id


async def test_a_load_of_what_must_be_fetched_downloads_it(
    client: AsyncClient, backend: Backend
) -> None:
    seen: list[LoadProgress] = []

    model = await client.load(backend.uncached, on_progress=seen.append)

    downloads = [progress.download for progress in seen if progress.download is not None]
    assert model.state is ModelState.READY
    assert ModelState.DOWNLOADING in {progress.state for progress in seen}
    assert downloads
    assert [d.downloaded_bytes for d in downloads] == sorted(d.downloaded_bytes for d in downloads)
    assert any(snapshot.repo_id == backend.uncached for snapshot in await client.cache.snapshots())


async def test_concurrent_loads_share_one_and_survive_each_other(
    client: AsyncClient, backend: Backend
) -> None:
    leaver, stayer = client.start_load(backend.model), client.start_load(backend.model)

    await anext(aiter(stayer))
    leaver.cancel()
    model = await stayer.result()

    assert model.state is ModelState.READY
    assert len(await client.models()) == 1


async def test_a_cancelled_load_raises_and_leaves_nothing(
    client: AsyncClient, backend: Backend
) -> None:
    operation = client.start_load(backend.uncached)
    await anext(aiter(operation))

    operation.cancel()

    with pytest.raises(errors.CallCancelledError):
        await operation.result()
    with pytest.raises(errors.CallCancelledError):  # it stays so
        await operation.result()

    async def settled() -> bool:
        states = {model.state for model in await client.models()}
        return not states & set(LOADING_STATES)

    await eventually(settled)


async def test_what_on_progress_raises_comes_back(client: AsyncClient, backend: Backend) -> None:
    def refuse(progress: LoadProgress) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await client.load(backend.model, on_progress=refuse)


@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, "float32"])
async def test_an_explicit_dtype_is_obeyed(
    client: AsyncClient, backend: Backend, dtype: Dtype
) -> None:
    model = await client.load(backend.model, dtype=dtype, device_map="cpu")

    assert model.details is not None
    assert model.details.dtype is Dtype.FLOAT32
    assert model.info.options.dtype is Dtype.FLOAT32
    assert model.info.options.device_map == "cpu"


async def test_a_missing_model_is_not_found(client: AsyncClient, backend: Backend) -> None:
    with pytest.raises(errors.ModelNotFoundError) as caught:
        await client.load(backend.missing)

    assert caught.value.code is StatusCode.NOT_FOUND
    assert caught.value.reason == "MODEL_NOT_FOUND"
    assert caught.value.model == backend.missing
    assert str(caught.value)


async def test_a_missing_revision_is_not_found(client: AsyncClient, backend: Backend) -> None:
    with pytest.raises(errors.RevisionNotFoundError) as caught:
        await client.load(backend.missing_revision)

    assert caught.value.revision == backend.missing_revision.partition("@")[2]


@pytest.mark.parametrize("name", ["", "no-slash-and a space", "a/b/c", "../up"])
async def test_a_malformed_name_is_refused(client: AsyncClient, name: str) -> None:
    with pytest.raises((errors.InvalidNameError, errors.ModelNotFoundError)) as caught:
        await client.load(name)

    if not name.startswith("."):  # those are paths, and may just not be there
        assert isinstance(caught.value, errors.InvalidNameError)
        assert caught.value.field == "model"
        assert caught.value.problem


async def test_an_unknown_device_is_refused(client: AsyncClient, backend: Backend) -> None:
    with pytest.raises(errors.InvalidArgumentError):
        await client.load(backend.model, device_map="nowhere")
    with pytest.raises(errors.UnsupportedOptionError):
        await client.load(backend.model, device_map="cuda:99")
    with pytest.raises(errors.UnsupportedOptionError) as caught:
        await client.load(backend.model, max_memory={"cuda:99": 1})
    assert caught.value.field == "options.max_memory"


MODULES = {"": "cpu", "model.layers.1": "disk"}


async def test_layers_are_where_they_were_asked_to_be(
    client: AsyncClient, backend: Backend
) -> None:
    plan = await client.plan(backend.model, device_map=MODULES)
    assert plan.fits
    assert plan.offloaded_disk_bytes > 0
    assert plan.offloaded_cpu_bytes == 0
    model = await client.load(backend.model, device_map=MODULES)
    assert model.info.options.device_map == MODULES
    assert model.details is not None
    assert model.details.device_map["model.layers.1"] == "disk"
    assert set(model.details.device_map.values()) == {"cpu", "disk"}
    assert 0 < model.details.offloaded_bytes < model.details.weight_bytes
    result = await model.generate("Once", max_new_tokens=3, temperature=0)
    assert result.text
    with pytest.raises(errors.InvalidArgumentError) as caught:
        await client.load(backend.model, device_map=MODULES, offload="disk")
    assert caught.value.field == "options.module_map"


async def test_what_is_allowed_and_not_needed_changes_nothing(
    client: AsyncClient, backend: Backend
) -> None:
    bounds = {"cpu": 8 << 30}
    model = await client.load(
        backend.model, device_map="balanced", max_memory=bounds, offload="cpu"
    )
    options = model.info.options
    assert (options.device_map, options.max_memory) == ("balanced", bounds)
    assert options.offload is Offload.CPU
    assert model.details is not None
    assert model.details.offloaded_bytes == 0
    assert len(model.details.device_map) == 1


async def test_unload_by_name(client: AsyncClient, model: AsyncModel) -> None:
    result = await client.unload(model.name)

    assert result.model.id == model.id
    assert await client.models() == []


async def test_refresh_brings_the_handle_up_to_date(client: AsyncClient, model: AsyncModel) -> None:
    before = model.info

    after = await model.refresh()

    assert after is model.info
    assert after.id == before.id
    await client.unload(model.id)
    with pytest.raises(errors.ModelNotLoadedError):
        await model.refresh()


async def test_calls_after_unload_say_so(model: AsyncModel) -> None:
    await model.unload()

    calls = [
        model.generate("x"),
        model.tokenize("x"),
        model.detokenize([1]),
        model.apply_chat_template([{"role": "user", "content": "x"}]),
        anext(aiter(model.stream("x"))),
    ]
    for call in calls:
        assert inspect.isawaitable(call)
        with pytest.raises(errors.ModelNotLoadedError):
            await call


async def test_many_loads_at_once_are_one(client: AsyncClient, backend: Backend) -> None:
    models = await asyncio.gather(*(client.load(backend.model) for _ in range(5)))

    assert len({model.id for model in models}) == 1


async def test_a_model_has_as_many_replicas_as_the_last_load_asked_for(
    client: AsyncClient, backend: Backend
) -> None:
    first = await client.load(backend.model, replicas=2)
    assert first.info.wanted_replicas == 2
    assert len({replica.worker_pid for replica in first.info.replicas}) == 2
    assert all(replica.devices and not replica.leaving for replica in first.info.replicas)
    same = await client.load(backend.model)
    assert (same.id, same.info.wanted_replicas) == (first.id, 2), "a load that does not say"
    fewer = await client.load(backend.model, replicas=1)
    assert (fewer.id, fewer.info.wanted_replicas) == (first.id, 1)
    assert (await fewer.unload()).freed_bytes > 0


@pytest.mark.parametrize("replicas", [0, 33])
async def test_a_number_of_replicas_out_of_bounds_is_refused(
    client: AsyncClient, backend: Backend, replicas: int
) -> None:
    for call in (client.load, client.plan):
        with pytest.raises(errors.InvalidArgumentError) as caught:
            await call(backend.model, replicas=replicas)
        assert caught.value.field == "replicas"
