"""The whole daemon on a box with a GPU: where models go, what they take, that it comes back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from loaderd.client import Client, Device, DeviceType, Dtype, ModelInfo, ModelState, errors
from tests.accelerator.gpu import DEVICE, SLACK, settled, steady_bytes, total_bytes, used_bytes
from tests.accelerator.models import build_model
from tests.daemon import SpawnedDaemon
from tests.faults.daemon.test_memory import make_huge_model
from tests.waiting import until

CONTEXT_BYTES = 1 << 30
"""More than the driver takes for a process, and for the libraries that a model has it load."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose weights are more than noise."""
    folder = tmp_path_factory.mktemp("gpu-models")
    build_model(folder / "llama", layers=12)
    return folder


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[SpawnedDaemon]:
    arguments = ["--allow-local", str(models)]
    with SpawnedDaemon(tmp_path_factory.mktemp("gpu-daemon"), arguments) as daemon:
        yield daemon


@pytest.fixture
def client(daemon: SpawnedDaemon) -> Iterator[Client]:
    with Client(daemon.address) as client:
        yield client
        for model in client.models():
            model.unload(force=True)


@pytest.fixture
def free(client: Client) -> int:
    """The GPU's memory in use while no model is loaded."""
    until(lambda: not client.models())
    return steady_bytes()


def gpu(client: Client) -> Device:
    device = client.devices()[0]
    assert device.id == DEVICE
    return device


def held_bytes(model: ModelInfo) -> int:
    assert model.details is not None
    assert model.details.memory_bytes is not None
    return model.details.memory_bytes


def test_the_gpu_is_listed_as_it_is(client: Client, free: int) -> None:
    device = gpu(client)
    assert device.type is DeviceType.CUDA
    assert "NVIDIA" in device.name
    assert 0.97 * total_bytes() < device.total_bytes <= total_bytes()
    assert abs(device.free_bytes - (total_bytes() - free)) < 0.02 * total_bytes()
    assert (device.reserved_bytes, device.holders) == (0, ())
    assert client.devices()[-1].type is DeviceType.CPU


def test_a_standby_holds_nothing_of_the_gpu(daemon: SpawnedDaemon, free: int) -> None:
    assert daemon.workers()
    assert free < SLACK + _used_without_us()


def _used_without_us() -> int:
    """What a GPU has in use that nobody uses."""
    return total_bytes() // 50


def test_auto_is_the_gpu_in_float16_with_replayed_steps(
    client: Client, models: Path, free: int
) -> None:
    for _ in range(2):  # the second time its trial is known
        model = client.load(models / "llama")
        details = model.info.details
        assert details is not None
        assert details.device_map == {"": DEVICE}
        assert details.dtype is Dtype.FLOAT16
        assert details.dtype_reason == "default on accelerators"
        assert details.engine == "batching"
        assert "decode steps replayed as CUDA graphs" in details.engine_reason
        result = model.generate("The sky is", max_new_tokens=50, ignore_eos=True)
        assert result.usage.generated_tokens == 50
        model.unload()


def test_what_a_model_takes_is_told_and_comes_back(client: Client, models: Path, free: int) -> None:
    model = client.load(models / "llama")
    details = model.info.details
    assert details is not None
    assert details.planned_bytes is not None
    used = used_bytes() - free
    told = held_bytes(model.info)
    print(
        f"weights {details.weight_bytes >> 20} MiB, planned {details.planned_bytes >> 20}, "
        f"told {told >> 20}, of the GPU {used >> 20}; {model.info.timings}"
    )
    assert details.weight_bytes < told
    assert abs(used - told) < CONTEXT_BYTES
    device = gpu(client)
    assert [holder.model_id for holder in device.holders] == [model.id]
    assert used - SLACK <= device.reserved_bytes < told + CONTEXT_BYTES
    assert device.available_bytes <= device.total_bytes - device.reserved_bytes
    model.generate("The sky is", max_new_tokens=200, ignore_eos=True)
    assert used_bytes() - free < used + CONTEXT_BYTES // 2
    assert model.unload().freed_bytes >= told // 2
    settled(lambda now: now < free + SLACK)
    assert gpu(client).reserved_bytes == 0
    assert gpu(client).available_bytes > device.available_bytes + told // 2


def test_two_models_beside_each_other(client: Client, models: Path, free: int) -> None:
    shutil.copytree(models / "llama", models / "other", dirs_exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(
            lambda name: client.load(models / name, dtype="float32"), ("llama", "other")
        )
        results = list(
            pool.map(
                lambda model: model.generate(
                    "One, two", max_new_tokens=100, ignore_eos=True, do_sample=False
                ),
                (one, other),
            )
        )
    assert results[0].text == results[1].text
    assert len(gpu(client).holders) == 2
    one.unload()
    assert other.generate("One", max_new_tokens=5, ignore_eos=True).usage.generated_tokens == 5
    other.unload()
    settled(lambda now: now < free + SLACK)


def test_a_worker_that_is_killed_gives_its_memory_back_and_comes_again(
    client: Client, models: Path, free: int
) -> None:
    model = client.load(models / "llama")
    details = model.info.details
    assert details is not None
    loaded = used_bytes()
    with model.stream("One, two,", max_new_tokens=4000, ignore_eos=True) as stream:
        next(iter(stream))
        psutil.Process(details.worker_pid).kill()
        with pytest.raises(errors.WorkerDiedError):
            list(stream)
    assert model.generate("One", max_new_tokens=5, ignore_eos=True).usage.generated_tokens == 5
    back = client.model(model.id).info
    assert back.state is ModelState.READY
    assert back.details is not None
    assert back.details.worker_pid != details.worker_pid
    assert abs(used_bytes() - loaded) < CONTEXT_BYTES // 2
    model.unload()
    settled(lambda now: now < free + SLACK)


def test_a_model_that_is_too_big_is_refused_before_it_is_read(
    client: Client, models: Path, free: int
) -> None:
    try:
        folder = make_huge_model(models / "huge")
    except OSError:
        pytest.skip("this file system has no files of two tebibytes")
    plan = client.plan(folder)
    assert not plan.fits
    with pytest.raises(errors.DeviceMemoryError) as caught:
        client.load(folder)
    assert caught.value.needed_bytes == plan.needed_bytes
    assert caught.value.free_bytes is not None
    assert caught.value.free_bytes <= gpu(client).total_bytes


def test_the_cpu_is_taken_where_it_is_asked_for(client: Client, models: Path, free: int) -> None:
    model = client.load(models / "llama", device_map="cpu")
    assert model.info.details is not None
    assert model.info.details.device_map == {"": "cpu"}
    assert model.generate("One", max_new_tokens=3, ignore_eos=True).usage.generated_tokens == 3
    assert used_bytes() < free + SLACK
    with pytest.raises(errors.UnsupportedOptionError):
        client.load(models / "llama", device_map="cuda:7")


def test_many_streams_through_the_daemon_are_those_of_one(client: Client, models: Path) -> None:
    model = client.load(models / "llama", dtype="float32", device_map=DEVICE)
    prompts = [f"{number}, and then" for number in range(24)]

    def ask(prompt: str) -> str:
        return model.generate(
            prompt, max_new_tokens=40, ignore_eos=True, seed=5, temperature=1.2, do_sample=True
        ).text

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(ask, prompts)) == alone
