"""Load, list, watch, unload: a spawned daemon, the real model, the SDK."""

import itertools
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import psutil
import pytest

from loaderd.client import (
    Client,
    Dtype,
    GenerationStream,
    HealthStatus,
    Model,
    ModelEvent,
    ModelList,
    ModelSource,
    ModelState,
    errors,
)
from loaderd.client.parameters import GenerationParameters
from loaderd.v1 import generation_pb2, model_pb2
from tests.daemon import SpawnedDaemon
from tests.waiting import until


def test_a_loaded_model_says_what_it_is(client: Client, real_model: Path) -> None:
    states = []
    model = client.load(str(real_model), on_progress=lambda step: states.append(step.state))
    assert states[-1] is ModelState.LOADING
    info = model.info
    assert (info.state, info.source, info.name) == (
        ModelState.READY,
        ModelSource.LOCAL,
        str(real_model),
    )
    assert info.details is not None
    assert info.details.architecture == "LlamaForCausalLM"
    assert info.details.parameter_count == 134_515_008
    assert info.details.has_chat_template
    assert info.details.engine == "batching"
    assert info.details.dtype_reason
    assert info.details.context_length == 8192
    assert info.timings.total is not None
    assert info.timings.download is None
    assert [each.id for each in client.models()] == [info.id]
    assert client.model(str(real_model)).id == client.model(info.id).id == info.id


def test_loading_again_answers_at_once_with_the_same_model(client: Client, model: Model) -> None:
    assert client.load(model.name).id == model.id
    assert client.load(model.name, device_map="auto").id == model.id


def test_other_options_are_another_model(client: Client, tiny_model: Path) -> None:
    half = client.load(str(tiny_model), dtype="float16")
    full = client.load(str(tiny_model), dtype=Dtype.FLOAT32)
    assert half.id != full.id
    assert half.info.details is not None
    assert full.info.details is not None
    assert (half.info.details.dtype, full.info.details.dtype) == (Dtype.FLOAT16, Dtype.FLOAT32)
    with pytest.raises(errors.InvalidArgumentError, match=half.id):
        client.model(str(tiny_model))
    assert half.generate("one", max_new_tokens=1).usage.generated_tokens == 1
    assert full.generate("one", max_new_tokens=1).usage.generated_tokens == 1


def test_concurrent_loads_of_one_model_share_one(
    daemon: SpawnedDaemon, client: Client, real_model: Path
) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(lambda _: client.load(str(real_model)).id, range(8)))
    assert len(ids) == 1
    assert len(client.models()) == 1
    assert daemon.log.count(f"{ids.pop()} {real_model}: loading") == 1


def test_cancelling_one_load_leaves_it_to_the_others(client: Client, real_model: Path) -> None:
    first = client.start_load(str(real_model))
    next(iter(first))
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(client.load, str(real_model))
        until(lambda: bool(client.models()))
        first.cancel()
        assert second.result(60).info.state is ModelState.READY


def test_cancelling_the_last_load_stops_it(client: Client, real_model: Path) -> None:
    load = client.start_load(str(real_model))
    next(iter(load))
    load.cancel()
    until(lambda: not client.models())
    assert client.load(str(real_model)).info.state is ModelState.READY


def test_unload_ends_the_process_and_says_what_it_freed(client: Client, model: Model) -> None:
    details = model.info.details
    assert details is not None
    assert psutil.pid_exists(details.worker_pid)
    result = model.unload()
    assert result.model.state is ModelState.UNLOADED
    assert result.freed_bytes > details.weight_bytes / 2
    assert not psutil.pid_exists(details.worker_pid)
    assert client.models() == []
    with pytest.raises(errors.ModelNotLoadedError):
        model.unload()
    with pytest.raises(errors.ModelNotLoadedError):
        model.generate("Hello")


def test_a_busy_model_is_unloaded_by_force_only(client: Client, model: Model) -> None:
    with model.stream("One, two,", max_new_tokens=2000, ignore_eos=True) as stream:
        next(iter(stream))
        with pytest.raises(errors.ModelInUseError) as caught:
            model.unload()
        assert caught.value.metadata["active_requests"] == "1"
        model.unload(force=True)
        with pytest.raises(errors.ModelUnloadedError, match="by force"):
            list(stream)
    assert client.models() == []


def test_a_watch_tells_every_state_in_order(client: Client, tiny_model: Path) -> None:
    states: list[tuple[ModelState | None, ModelState]] = []
    sequence: list[int] = []
    watching, done = threading.Event(), threading.Event()

    def watch() -> None:
        with client.watch() as updates:
            for update in updates:
                if isinstance(update, ModelList):
                    assert list(update) == []
                    watching.set()
                elif isinstance(update, ModelEvent):
                    states.append((update.previous_state, update.model.state))
                    sequence.append(update.sequence)
                    if update.model.state is ModelState.UNLOADED:
                        break
        done.set()

    threading.Thread(target=watch, daemon=True).start()
    assert watching.wait(20)
    client.load(str(tiny_model)).unload()
    assert done.wait(20)
    assert [state for _, state in states] == [
        ModelState.RESOLVING,
        ModelState.LOADING,
        ModelState.READY,
        ModelState.UNLOADING,
        ModelState.UNLOADED,
    ]
    assert [before for before, _ in states[1:]] == [state for _, state in states[:-1]]
    assert sequence == list(range(sequence[0], sequence[0] + len(sequence)))


def test_health_follows_a_model(client: Client, tiny_model: Path) -> None:
    assert client.health() is HealthStatus.SERVING
    assert client.health("loaderd.v1.GenerationService") is HealthStatus.SERVING
    model = client.load(str(tiny_model))
    until(lambda: client.health(model.id) is HealthStatus.SERVING)
    assert client.health(str(tiny_model)) is HealthStatus.SERVING
    model.unload()
    until(lambda: client.health(str(tiny_model)) is HealthStatus.NOT_SERVING)


def test_a_worker_that_is_killed_takes_its_model_and_nothing_else(
    client: Client, model: Model, tiny_model: Path
) -> None:
    other = client.load(str(tiny_model))
    details = model.info.details
    assert details is not None
    with client.watch() as updates:
        assert isinstance(next(iter(updates)), ModelList)
        with model.stream("One, two,", max_new_tokens=2000, ignore_eos=True) as stream:
            next(iter(stream))
            psutil.Process(details.worker_pid).kill()
            with pytest.raises(errors.WorkerDiedError) as caught:
                list(stream)
        assert caught.value.retry_after is not None
        assert other.generate("one", max_new_tokens=2).usage.generated_tokens <= 2
        events = list(itertools.islice(updates, 3))
    assert [event.model.state for event in events if isinstance(event, ModelEvent)] == [
        ModelState.FAILED,
        ModelState.LOADING,
        ModelState.READY,
    ]
    failed, _, back = (event.model for event in events if isinstance(event, ModelEvent))
    assert failed.failure is not None
    assert failed.failure.reason == "WORKER_DIED"
    assert failed.id == back.id == model.id
    assert back.details is not None
    assert back.details.worker_pid != details.worker_pid
    assert model.generate("One, two,", max_new_tokens=4).usage.generated_tokens == 4
    assert client.health(model.name) is HealthStatus.SERVING


def test_a_replica_that_is_killed_takes_its_streams_and_nothing_else(
    client: Client, tiny_model: Path
) -> None:
    model = client.load(str(_with_context(tiny_model, 4096)), replicas=2)
    first, second = model.info.replicas
    long: GenerationParameters = {"max_new_tokens": 800, "ignore_eos": True}
    with model.stream("one", **long) as one, model.stream("two", **long) as two:
        next(iter(one))
        next(iter(two))
        assert [each.running_requests for each in model.refresh().replicas] == [1, 1]
        psutil.Process(first.worker_pid).kill()
        outcomes = [_outcome(stream) for stream in (one, two)]
    assert sorted(outcomes) == ["WORKER_DIED", "whole"]
    assert model.refresh().state is ModelState.READY
    until(lambda: len(model.refresh().replicas) == 2)
    back = model.info
    assert (back.state, back.wanted_replicas) == (ModelState.READY, 2)
    assert second in {replace(each, memory_bytes=second.memory_bytes) for each in back.replicas}
    assert first.worker_pid not in {each.worker_pid for each in back.replicas}
    pids = [each.worker_pid for each in back.replicas]
    assert model.unload().freed_bytes > max(each.memory_bytes for each in back.replicas)
    assert not any(map(psutil.pid_exists, pids))


def _with_context(tiny_model: Path, tokens: int) -> Path:
    """A copy of the model that takes so many tokens."""
    folder = tiny_model.with_name(f"{tiny_model.name}-{tokens}")
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = tokens
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _outcome(stream: GenerationStream) -> str:
    try:
        for _ in stream:
            pass
    except errors.WorkerDiedError as error:
        return error.reason
    return "whole"


def test_a_request_loads_the_model_that_it_names(client: Client, tiny_model: Path) -> None:
    request = generation_pb2.GenerateRequest(model=str(tiny_model), text="one", max_new_tokens=2)
    request.keep_alive.FromSeconds(0)
    answer = client.raw.generation.Generate(request, timeout=60)
    assert answer.usage.generated_tokens
    until(lambda: not client.models())  # its first use has ended


@pytest.mark.parametrize(
    "name",
    ["", " ", "a/b/c", "org/", "/", "../x", "org/name@", "org/name@../../x", "org/na me", "org//x",
     "~/model", "./model", "org/name@a b", "x" * 200],
)  # fmt: skip
def test_an_invalid_name_is_refused(daemon: SpawnedDaemon, client: Client, name: str) -> None:
    request = model_pb2.LoadModelRequest(model=name)  # as it is: the SDK makes paths absolute
    with pytest.raises(grpc.RpcError) as caught:
        list(client.raw.models.LoadModel(request, timeout=20))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert client.models() == []


def test_a_folder_outside_the_roots_is_refused_by_naming_the_flag(
    client: Client, tmp_path: Path
) -> None:
    with pytest.raises(errors.InvalidNameError, match="--allow-local"):
        client.load(str(tmp_path))


def test_a_folder_that_is_not_there(client: Client, tiny_model: Path) -> None:
    with pytest.raises(errors.ModelNotFoundError):
        client.load(str(tiny_model.parent / "nothing"))


def _broken_copy(tiny_model: Path, name: str) -> Path:
    copy = tiny_model.parent / name
    shutil.copytree(tiny_model, copy, dirs_exist_ok=True)
    return copy


def test_cut_weights_are_never_loaded(client: Client, tiny_model: Path) -> None:
    broken = _broken_copy(tiny_model, "cut")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(errors.SnapshotCorruptError) as caught:
        client.load(str(broken))
    assert caught.value.metadata["file"] == "model.safetensors"


def test_missing_tensors_are_never_made_up(client: Client, tiny_model: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = _broken_copy(tiny_model, "missing")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(errors.SnapshotCorruptError):
        client.load(str(broken))
    failed = client.model(str(broken))
    assert failed.info.state is ModelState.FAILED
    assert failed.info.failure is not None
    assert failed.info.failure.reason == "SNAPSHOT_CORRUPT"
    failed.unload()
    assert client.models() == []


def test_an_architecture_that_nobody_knows(client: Client, tiny_model: Path) -> None:
    broken = _broken_copy(tiny_model, "unknown")
    config = json.loads((broken / "config.json").read_text())
    config |= {"model_type": "no-such-type", "architectures": ["NoSuchModel"]}
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.ModelUnsupportedError):
        client.load(str(broken))


def test_pickles_are_not_loaded(client: Client, tiny_model: Path) -> None:
    broken = _broken_copy(tiny_model, "pickle")
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(errors.ModelUnsupportedError, match="safetensors"):
        client.load(str(broken))


def test_a_device_that_is_not_there_is_refused(client: Client, tiny_model: Path) -> None:
    with pytest.raises(errors.UnsupportedOptionError, match="cuda:7"):
        client.load(str(tiny_model), device_map="cuda:7")
    with pytest.raises(errors.InvalidArgumentError, match="device_map"):
        client.load(str(tiny_model), device_map="the moon")


def test_devices_and_info(client: Client) -> None:
    cpu = client.devices()[-1]
    assert cpu.id == "cpu"
    assert 0 < cpu.free_bytes <= cpu.total_bytes
    assert cpu.cores
    info = client.info()
    assert info.version
    assert not info.offline
    assert {"python", "torch", "transformers"} <= set(info.versions)
