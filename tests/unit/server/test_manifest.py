"""Models that are to be there always, on fake workers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from loaderd.server.config import ConfigError, DeclaredModel, ServerConfig
from loaderd.server.errors import ModelUnsupportedError
from loaderd.server.models.manifest import Declared, Manifest, declared
from loaderd.server.models.record import LoadOptions
from loaderd.server.models.where import Where
from loaderd.v1 import model_pb2
from tests.unit.server.box import Box, make_model
from tests.waiting import until_in_loop as until

SOON_S = 0.01


def manifest(box: Box, *models: Declared) -> Manifest:
    return Manifest(models, box.registry, box.loads, first_wait_s=SOON_S)


async def test_what_is_declared_is_loaded_as_declared(box: Box, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other")
    options = LoadOptions(dtype=model_pb2.DTYPE_FLOAT32)
    await manifest(
        box, Declared(str(box.folder)), Declared(str(other), options, keep_alive_s=60, replicas=2)
    ).loaded()
    first, second = await box.list()
    assert (first.name, first.keep_alive.ToTimedelta().total_seconds()) == (str(box.folder), -1)
    assert (second.name, second.keep_alive.seconds) == (str(other), 60)
    assert (len(first.replicas), len(second.replicas)) == (1, 2)
    assert second.options.dtype == model_pb2.DTYPE_FLOAT32
    assert {first.state, second.state} == {model_pb2.MODEL_STATE_READY}


async def test_what_does_not_load_is_tried_again_and_holds_up_no_other(
    box: Box, tmp_path: Path
) -> None:
    late = tmp_path / "late"
    running = asyncio.create_task(
        manifest(box, Declared(str(late)), Declared(str(box.folder))).loaded()
    )
    await until(lambda: box.launcher.loads == 1)
    box.launcher.load_error = ModelUnsupportedError(model="x", problem="y")
    make_model(late)
    await until(lambda: box.launcher.loads > 3)
    assert not running.done()
    box.launcher.load_error = None
    await running
    assert {model.name for model in await box.list()} == {str(late), str(box.folder)}


async def test_what_is_declared_later_is_loaded_and_what_is_not_any_more_is_not_tried_again(
    box: Box, tmp_path: Path
) -> None:
    first, unwanted = Declared(str(box.folder)), Declared(str(tmp_path / "unwanted"))
    models = manifest(box, first, unwanted)
    running = asyncio.create_task(models.run())
    await until(lambda: box.launcher.loads == 1)
    other = Declared(str(make_model(tmp_path / "other")), keep_alive_s=60)
    models.declare([other, first])
    await until(lambda: box.launcher.loads == 2)
    await models.loaded()
    make_model(tmp_path / "unwanted")
    await box.models.UnloadModel(model_pb2.UnloadModelRequest(model=first.name))
    models.declare([first, other, Declared(str(make_model(tmp_path / "last")))])
    await until(lambda: box.launcher.loads == 3)
    await models.loaded()
    assert {Path(model.name).name for model in await box.list()} == {"other", "last"}
    running.cancel()


async def test_a_daemon_that_drains_loads_no_more(box: Box) -> None:
    await box.registry.drain(0)
    await manifest(box, Declared(str(box.folder))).loaded()
    assert box.launcher.loads == 0


def test_where_layers_go_is_as_the_file_says() -> None:
    models = (
        DeclaredModel(name="org/a", max_memory={"cpu": 5}, offload="disk", device_map="balanced"),
        DeclaredModel(name="org/b", device_map={"model": "cpu", "lm_head": "disk"}),
    )
    first, second, third = declared(ServerConfig(models=models, preload=("org/c",)))
    assert first.options.where == Where(
        "balanced", max_memory=(("cpu", 5),), offload=model_pb2.OFFLOAD_DISK
    )
    assert second.options.where == Where(module_map=(("lm_head", "disk"), ("model", "cpu")))
    assert third.options == LoadOptions()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"device_map": {}}, "org/a: options.module_map: names no module"),
        ({"device_map": "the moon"}, "org/a: options.device_map"),
        ({"device_map": {"": "cpu"}, "offload": "disk"}, "org/a: options.module_map"),
        ({"quantization": "int8", "offload": "disk"}, "org/a: options.quantization"),
    ],
)
def test_what_the_file_cannot_mean_is_told(options: dict[str, Any], problem: str) -> None:
    model = DeclaredModel(name="org/a", **options)
    with pytest.raises(ConfigError, match=problem):
        declared(ServerConfig(models=(model,)))
