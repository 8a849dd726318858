"""The public services over gRPC, on fake workers: what clients see when things go wrong."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from loaderd.server.errors import ModelNotLoadedError, ModelUnsupportedError, SlowConsumerError
from loaderd.server.models.lifecycle import ModelState
from loaderd.server.models.record import LoadOptions
from loaderd.server.models.registry import ModelRegistry
from loaderd.server.store.names import LocalName
from loaderd.v1 import (
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    system_pb2,
)
from tests.unit.server.box import MAX_REQUESTS, Box, reason_of
from tests.waiting import until_in_loop as until


async def test_waiters_share_a_load_and_its_failure(box: Box) -> None:
    box.launcher.load_gate.clear()
    request = model_pb2.LoadModelRequest(model=str(box.folder))
    loads = [box.models.LoadModel(request, timeout=30) for _ in range(5)]
    for load in loads:
        await anext(aiter(load))  # it has joined
    box.launcher.load_error = ModelUnsupportedError(model="x", problem="y")
    box.launcher.load_gate.set()
    assert [await reason_of(load) for load in loads] == ["MODEL_UNSUPPORTED"] * 5
    assert box.launcher.loads == 1
    (failed,) = await box.list()
    assert failed.state == model_pb2.MODEL_STATE_FAILED
    box.launcher.load_error = None
    assert (await box.load()).state == model_pb2.MODEL_STATE_READY
    assert [model.state for model in await box.list()] == [model_pb2.MODEL_STATE_READY]


async def test_the_last_waiter_that_leaves_stops_the_load(box: Box) -> None:
    box.launcher.load_gate.clear()
    loads = [asyncio.create_task(box.load()) for _ in range(3)]
    await until(lambda: box.launcher.loads == 1)
    for load in loads[:-1]:
        load.cancel()
    await asyncio.sleep(0.1)
    assert len(await box.list()) == 1
    loads[-1].cancel()
    async with asyncio.timeout(10):
        while await box.list():
            await asyncio.sleep(0.01)
        await box.launcher.workers[0].wait()


async def test_a_load_is_unloaded_by_force_only_and_its_waiters_are_told(box: Box) -> None:
    box.launcher.load_gate.clear()
    load = asyncio.create_task(reason_of(box.models.LoadModel(
        model_pb2.LoadModelRequest(model=str(box.folder)), timeout=30
    )))  # fmt: skip
    await until(lambda: box.launcher.loads == 1)
    unload = model_pb2.UnloadModelRequest(model=str(box.folder))
    assert await reason_of(box.models.UnloadModel(unload, timeout=30)) == "MODEL_IN_USE"
    unload.force = True
    answer = await box.models.UnloadModel(unload, timeout=30)
    assert answer.model.state == model_pb2.MODEL_STATE_UNLOADED
    assert await load == "MODEL_UNLOADED"
    assert await box.list() == []


async def test_a_full_queue_is_refused_at_once_and_others_go_on(box: Box) -> None:
    await box.load()
    running = [box.stream("hang") for _ in range(MAX_REQUESTS)]
    for stream in running:
        await anext(aiter(stream))
    assert await reason_of(box.stream("count 1")) == "QUEUE_FULL"
    (model,) = await box.list()
    assert model.active_requests == MAX_REQUESTS
    running[0].cancel()
    await until(lambda: len(box.launcher.workers[0].cancelled) == 1)
    texts = [message.delta.text async for message in box.stream("count 2")]
    assert "".join(texts) == "0 1 "
    for stream in running:
        stream.cancel()
    await until(lambda: len(box.launcher.workers[0].cancelled) == MAX_REQUESTS)
    assert box.launcher.workers[0].running_requests == 0


async def ask_once_and_twice(box: Box, address: str) -> list[str]:
    """Who the worker thinks has asked: one connection, and another one with two requests."""
    own = [("grpc.use_local_subchannel_pool", 1)]  # else one process shares its connections
    request = generation_pb2.GenerateRequest(model=str(box.folder), text="count 1")
    async with (
        grpc.aio.insecure_channel(address, options=own) as one,
        grpc.aio.insecure_channel(address, options=own) as other,
    ):
        for channel in (one, other, other):
            stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
            await stub.Generate(request, timeout=30)
    return box.launcher.workers[0].clients[-3:]


async def test_each_tcp_connection_is_a_client_of_its_own_in_the_queue(box: Box) -> None:
    await box.load()
    one, *other = await ask_once_and_twice(box, box.tcp)
    assert one
    assert one not in other
    assert other[0] == other[1]
    await anext(aiter(box.stream("count 1")))
    assert box.launcher.workers[0].clients[-1] not in {"", one, *other}  # a stream is told as well


async def test_who_comes_over_the_socket_is_not_known(box: Box) -> None:
    await box.load()
    assert await ask_once_and_twice(box, box.socket) == ["", "", ""]


async def test_a_deadline_cancels_the_request_in_the_worker(box: Box) -> None:
    await box.load()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in box.stream("hang", timeout=0.2):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: len(box.launcher.workers[0].cancelled) == 1)


async def test_a_reader_that_does_not_read_is_cut_off_and_others_are_not(box: Box) -> None:
    await box.load()
    slow = box.stream("flood")
    await anext(aiter(slow))
    texts = [message.delta.text async for message in box.stream("count 3")]
    assert "".join(texts) == "0 1 2 "
    # What gRPC buffers on the way is about 6 MiB; then the daemon's own bound is reached.
    await until(lambda: len(box.launcher.workers[0].cancelled) == 1)
    (model,) = await box.list()
    assert model.active_requests == 0  # it holds no place in the queue, though it still is there
    assert await reason_of(slow) == "SLOW_CONSUMER"


async def test_a_dead_worker_ends_unary_calls_streams_and_tokenizer_calls(box: Box) -> None:
    model = await box.load()
    hanging = [
        asyncio.create_task(reason_of(box.stream("hang"))),
        asyncio.create_task(reason_of(box.generation.Generate(
            generation_pb2.GenerateRequest(model=model.id, text="hang"), timeout=30
        ))),
    ]  # fmt: skip
    await until(lambda: box.launcher.workers[0].running_requests == 2)
    assert await reason_of(box.stream("die")) == "WORKER_DIED"
    assert await asyncio.gather(*hanging) == ["WORKER_DIED", "WORKER_DIED"]
    (failed,) = await box.list()
    assert failed.state == model_pb2.MODEL_STATE_FAILED
    assert await reason_of(box.stream("count 1")) == "MODEL_NOT_LOADED"


async def test_an_error_of_the_worker_reaches_the_client(box: Box) -> None:
    await box.load()
    assert await reason_of(box.stream("fail")) == "DEVICE_MEMORY"
    request = generation_pb2.TokenizeRequest(model=str(box.folder), text="x")
    assert list((await box.generation.Tokenize(request, timeout=30)).token_ids) == [1, 2, 3]


async def test_two_models_of_one_name_are_told_apart_by_id(box: Box) -> None:
    first = await box.load()
    request = model_pb2.LoadModelRequest(model=str(box.folder))
    request.options.dtype = model_pb2.DTYPE_FLOAT32
    async for message in box.models.LoadModel(request, timeout=30):
        second = message.model
    assert first.id != second.id
    assert await reason_of(box.stream("count 1")) == "INVALID_ARGUMENT"
    async for message in box.stream("count 1", model=second.id):
        if message.HasField("started"):
            assert message.started.model_id == second.id


async def test_a_watcher_that_falls_behind_is_cut_off_and_the_bus_goes_on() -> None:
    registry = ModelRegistry(MAX_REQUESTS)
    with registry.events.subscribe() as slow, registry.events.subscribe() as quick:
        received = 0
        quick_events = aiter(quick)
        for _ in range(5000):
            record = registry.add(LocalName(Path("/model")), LoadOptions())
            registry.to(record, ModelState.UNLOADED)
            await anext(quick_events)
            await anext(quick_events)
        with pytest.raises(SlowConsumerError):
            async for _ in slow:
                received += 1
        assert 0 < received < 10_000


async def test_draining_refuses_work_and_ends_watches_but_lets_requests_finish(box: Box) -> None:
    await box.load()
    running = box.stream("hang")
    await anext(aiter(running))
    watch = box.models.WatchModels(model_pb2.WatchModelsRequest(), timeout=30)
    await anext(aiter(watch))
    drain = asyncio.create_task(box.registry.drain(20))
    assert await reason_of(watch) == "DRAINING"
    assert await reason_of(box.stream("count 1")) == "DRAINING"
    load = model_pb2.LoadModelRequest(model=str(box.folder))
    assert await reason_of(box.models.LoadModel(load, timeout=30)) == "DRAINING"
    assert (await box.system.GetServerInfo(system_pb2.GetServerInfoRequest())).draining
    assert not drain.done()
    running.cancel()
    async with asyncio.timeout(10):
        await drain


async def test_another_load_of_the_name_does_not_disturb_the_model_that_is_ready(box: Box) -> None:
    ready = await box.load()
    box.launcher.load_gate.clear()
    request = model_pb2.LoadModelRequest(model=str(box.folder))
    request.options.device_map = "cpu"
    load = box.models.LoadModel(request, timeout=30)
    await anext(aiter(load))
    started = await anext(aiter(box.stream("count 1")))
    assert started.started.model_id == ready.id
    box.launcher.load_gate.set()


async def test_a_request_between_the_check_and_the_unload_is_refused_not_cut(box: Box) -> None:
    model = await box.load()
    unload = asyncio.ensure_future(box.registry.unload(model.id, force=False))
    await asyncio.sleep(0)  # it has checked
    with pytest.raises(ModelNotLoadedError), box.registry.use(model.id):
        pass
    view, _ = await unload
    assert view.state is ModelState.UNLOADED


async def test_a_load_that_is_unloaded_has_ended_when_that_is_said(box: Box) -> None:
    box.launcher.load_gate.clear()
    request = model_pb2.LoadModelRequest(model=str(box.folder))
    load = box.models.LoadModel(request, timeout=30)
    await anext(aiter(load))
    await until(lambda: box.launcher.loads == 1)
    await box.models.UnloadModel(
        model_pb2.UnloadModelRequest(model=str(box.folder), force=True), timeout=30
    )
    assert box.launcher.workers[0].exited


async def test_a_cancelled_tokenizer_call_keeps_its_place_until_the_worker_is_done(
    box: Box,
) -> None:
    await box.load()
    box.launcher.workers[0].deaf_to_calls = True
    request = generation_pb2.TokenizeRequest(model=str(box.folder), text="x")
    for _ in range(MAX_REQUESTS):
        with pytest.raises(grpc.aio.AioRpcError):
            await box.generation.Tokenize(request, timeout=0.1)
    assert await reason_of(box.generation.Tokenize(request, timeout=30)) == "QUEUE_FULL"
    box.launcher.workers[0].deaf_to_calls = False
    box.launcher.workers[0].answer_calls()
    await until(lambda: box.registry.views()[0].active_requests == 0)


@pytest.mark.parametrize("name", ["m:" + "x" * 20_000, "/" + "\u00e4" * 3000, "o/" + "x" * 4000])
async def test_a_long_name_is_a_status_of_ours(box: Box, name: str) -> None:
    request = model_pb2.GetModelRequest(model=name)
    assert await reason_of(box.models.GetModel(request, timeout=30)) in {
        "INVALID_NAME",
        "MODEL_NOT_LOADED",
    }


async def test_a_path_with_a_name_that_is_too_long_is_invalid(box: Box) -> None:
    request = model_pb2.LoadModelRequest(model=str(box.folder / ("x" * 300)))
    assert await reason_of(box.models.LoadModel(request, timeout=30)) == "INVALID_NAME"


async def test_a_looping_link_is_no_defect(box: Box, tmp_path: Path) -> None:
    await box.load()
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    request = model_pb2.GetModelRequest(model=str(loop))
    assert await reason_of(box.models.GetModel(request, timeout=30)) == "MODEL_NOT_LOADED"


def test_the_model_that_failed_last_is_the_last_that_is_forgotten() -> None:
    async def run() -> None:
        registry = ModelRegistry(MAX_REQUESTS)
        oldest = registry.add(LocalName(Path("/oldest")), LoadOptions())
        for number in range(40):
            record = registry.add(LocalName(Path(f"/{number}")), LoadOptions())
            registry.to(record, ModelState.FAILED, ModelUnsupportedError("x", "y"))
        registry.to(oldest, ModelState.FAILED, ModelUnsupportedError("x", "y"))
        assert registry.find("/oldest") is oldest
        assert len(registry.views()) == 16

    asyncio.run(run())


async def test_the_two_generate_requests_are_equal_field_by_field() -> None:
    unary = generation_pb2.GenerateRequest.DESCRIPTOR
    streaming = generation_pb2.StreamGenerateRequest.DESCRIPTOR

    def fields(descriptor: Any) -> dict[str, tuple[object, ...]]:
        return {
            field.name: (
                field.number,
                field.type,
                field.is_repeated,
                field.has_presence,
                field.containing_oneof and field.containing_oneof.name,
            )
            for field in descriptor.fields
            if field.name != "logit_bias"
        }

    assert fields(unary) == fields(streaming)
    first, second = (each.fields_by_name["logit_bias"] for each in (unary, streaming))
    assert first.number == second.number
    assert fields(first.message_type) == fields(second.message_type)
