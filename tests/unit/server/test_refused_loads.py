"""Loads that are refused leave nothing; those that fail on their way leave a model that FAILED."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from loaderd.server.errors import (
    DeviceMemoryError,
    InvalidArgumentError,
    LoaderdError,
    SnapshotCorruptError,
    UnsupportedOptionError,
)
from loaderd.v1 import model_pb2
from tests.unit.server.box import Box, reason_of
from tests.waiting import until_in_loop as until


def request(box: Box, options: dict[str, Any], **fields: Any) -> model_pb2.LoadModelRequest:
    given = {"model": str(box.folder)} | fields
    return model_pb2.LoadModelRequest(options=model_pb2.LoadOptions(**options), **given)


@pytest.mark.parametrize(
    ("options", "fields", "reason"),
    [
        ({"device_map": "foo"}, {}, "INVALID_ARGUMENT"),
        ({"device_map": "cuda:7"}, {}, "UNSUPPORTED_OPTION"),
        ({"module_map": {"": "cuda:7"}}, {}, "UNSUPPORTED_OPTION"),
        ({"max_memory": {"cuda:7": 1 << 40}}, {}, "UNSUPPORTED_OPTION"),
        ({"max_memory": {"cpu": 1}}, {}, "DEVICE_MEMORY"),
        ({"dtype": 77}, {}, "INVALID_ARGUMENT"),
        ({}, {"replicas": 0}, "INVALID_ARGUMENT"),
    ],
)
async def test_what_the_daemon_refuses_leaves_nothing(
    box: Box, options: dict[str, Any], fields: dict[str, Any], reason: str
) -> None:
    refused = request(box, options, **fields)
    assert await reason_of(box.models.LoadModel(refused, timeout=30)) == reason
    assert await box.list() == []
    assert box.launcher.loads == 0


@pytest.mark.parametrize(
    ("options", "fields", "text"),
    [
        ({"device_map": "foo"}, {}, 'options.device_map: \'foo\' is none of "auto", "balanced"'),
        ({}, {"replicas": 0}, "replicas: 0 is not from 1 to 32"),
    ],
)
async def test_a_refusal_says_what_was_given_and_what_could_be(
    box: Box, options: dict[str, Any], fields: dict[str, Any], text: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(box.models.LoadModel(request(box, options, **fields), timeout=30)))
    assert str(caught.value.details()).startswith(text)


async def test_a_path_that_is_not_there_is_one_of_the_daemons_box(box: Box) -> None:
    path = str(box.folder / "nope")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(box.models.LoadModel(request(box, {}, model=path), timeout=30)))
    assert caught.value.details() == (
        f"model '{path}' was not found; the daemon's box has no such folder, and no such GGUF file"
    )


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgumentError("options.module_map", "the model has no module 'x'"),
        UnsupportedOptionError("options.dtype", "this engine cannot"),
    ],
)
async def test_an_option_that_only_the_worker_can_refuse_leaves_nothing(
    box: Box, error: LoaderdError
) -> None:
    box.launcher.load_error = error
    call = box.models.LoadModel(request(box, {}), timeout=30)
    assert await reason_of(call) == error.reason
    assert await box.list() == []


@pytest.mark.parametrize(
    "error", [DeviceMemoryError(model="x"), SnapshotCorruptError("x", "file", "a", "b")]
)
async def test_what_fails_in_a_worker_stays_in_the_list(box: Box, error: LoaderdError) -> None:
    box.launcher.load_error = error
    call = box.models.LoadModel(request(box, {}), timeout=30)
    assert await reason_of(call) == error.reason
    (failed,) = await box.list()
    assert failed.state == model_pb2.MODEL_STATE_FAILED
    assert failed.failure.reason == error.number


async def test_watchers_hear_of_a_load_that_is_refused_on_its_way(box: Box) -> None:
    updates = aiter(box.models.WatchModels(model_pb2.WatchModelsRequest(), timeout=30))
    await anext(updates)
    refused = request(box, {"max_memory": {"cpu": 1}})
    await reason_of(box.models.LoadModel(refused, timeout=30))
    reasons: list[model_pb2.ChangeReason.ValueType] = []
    while not reasons or reasons[-1] != model_pb2.CHANGE_REASON_FORGOTTEN:
        reasons.append((await anext(updates)).event.reason)
    assert reasons[-2] == model_pb2.CHANGE_REASON_FAILURE


async def test_a_model_that_was_there_stays_when_it_is_not_let_in_again(box: Box) -> None:
    model = await box.load()
    box.launcher.workers[0].kill()
    await until(lambda: not box.registry.records()[0].is_alive)
    box.launcher.load_error = UnsupportedOptionError("options.dtype", "this engine cannot")
    assert await reason_of(box.models.LoadModel(request(box, {}), timeout=30)) == (
        "UNSUPPORTED_OPTION"
    )
    (failed,) = await box.list()
    assert (failed.id, failed.state) == (model.id, model_pb2.MODEL_STATE_FAILED)
