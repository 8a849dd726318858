"""How a worker process begins and ends."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from loaderd.v1.errors_pb2 import ErrorReason
from loaderd.v1.generation_pb2 import TokenizeRequest
from loaderd.worker.v1 import worker_pb2
from tests.hub.tiny_models import build_tiny_model
from tests.integration.worker.harness import COMMAND, TIMEOUT, LinkServer, Worker

Start = Callable[[], Worker]


def test_a_worker_says_who_it_is_then_what_the_box_has(start: Start) -> None:
    worker = start()
    hello = worker.expect("hello")
    assert (hello.worker_id, hello.token) == ("w1", worker.token)
    standby = worker.expect("standby")
    assert standby.devices[-1].id == "cpu"
    assert 0 < standby.devices[-1].free_bytes <= standby.devices[-1].total_bytes
    assert 1 <= standby.devices[-1].cores <= (os.cpu_count() or 1)
    assert {"torch", "transformers"} <= standby.versions.keys()
    assert worker.heartbeats, "the imports take seconds, in which it must be seen to live"
    process = psutil.Process(worker.process.pid)
    assert worker.token not in " ".join(process.cmdline())
    assert worker.token not in str(process.environ())
    # Without a model, every request is refused and the worker lives on.
    refused = worker.generate(text="x").error
    assert refused is not None
    assert refused.reason == ErrorReason.ERROR_REASON_MODEL_NOT_LOADED
    reply = worker.call(tokenize=TokenizeRequest(text="x"))
    assert reply.error.reason == ErrorReason.ERROR_REASON_MODEL_NOT_LOADED
    for number in (signal.SIGINT, signal.SIGHUP):  # the whole group may get them
        worker.process.send_signal(number)
        assert worker.call(tokenize=TokenizeRequest(text="x")).HasField("error")
    worker.send(shutdown=worker_pb2.Shutdown())
    assert worker.process.wait(TIMEOUT) == 0


def end_of_stream(worker: Worker) -> None:
    worker.server.commands.put(None)


def end_of_stdin(worker: Worker) -> None:
    worker.stdin.close()


def broken_link(worker: Worker) -> None:
    worker.server.stop()


def sigterm(worker: Worker) -> None:
    worker.process.terminate()


@pytest.mark.parametrize("end", [end_of_stream, end_of_stdin, broken_link, sigterm])
def test_it_ends_with_its_link_its_daemon_or_on_demand_while_it_still_imports(
    start: Start, end: Callable[[Worker], None]
) -> None:
    worker = start()
    worker.expect("hello")
    end(worker)
    assert worker.process.wait(TIMEOUT) in {0, -signal.SIGTERM}


def test_it_ends_in_the_middle_of_a_generation(start: Start, tiny_model: Path) -> None:
    worker = start()
    worker.expect("standby")
    worker.load(tiny_model)
    worker.wait_for_delta(worker.start(text="x", max_new_tokens=200, ignore_eos=True))
    worker.stdin.close()
    assert worker.process.wait(TIMEOUT) == 0


PARENT = """
import subprocess, sys, time
worker = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)
worker.stdin.write(b"token\\n")
worker.stdin.flush()
# Somebody else holds the pipe open too: only the kernel's signal is left.
subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, pass_fds=[worker.stdin.fileno()])
print(worker.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a parent-death signal of Linux")
def test_it_dies_with_a_daemon_that_is_killed(tmp_path: Path) -> None:
    server = LinkServer(tmp_path)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *COMMAND, "--link", server.address, "--id", "w1"],
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    assert parent.stdout is not None
    try:
        worker = psutil.Process(int(parent.stdout.readline()))
        assert server.events.get(timeout=TIMEOUT).HasField("hello")
        parent.kill()
        parent.wait(TIMEOUT)
        worker.wait(TIMEOUT)
        assert not worker.is_running()
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.stdout.close()
        server.stop()


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "options", "reason", "metadata"),
    [
        (drop_tensor, {}, "SNAPSHOT_CORRUPT", {"expected": "a tensor 'model.norm.weight'"}),
        (None, {"device_map": "cuda:99"}, "UNSUPPORTED_OPTION", {"field": "options.device_map"}),
        (None, {"module_map": {"model": "cpu"}}, "INVALID_ARGUMENT", {}),
    ],
)
def test_a_load_that_fails_says_why_and_the_worker_ends(
    start: Start,
    tmp_path: Path,
    tiny_model: Path,
    damage: Callable[[Path], None] | None,
    options: dict[str, Any],
    reason: str,
    metadata: dict[str, str],
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    if damage is not None:
        damage(folder)
    worker = start()
    error = worker.load_error(folder, **options)
    assert ErrorReason.Name(error.reason) == f"ERROR_REASON_{reason}"
    assert metadata.items() <= dict(error.metadata).items()
    assert not any(str(tmp_path) in value for value in error.metadata.values())
    assert worker.process.wait(TIMEOUT) == 0


def test_a_model_in_shards_with_an_explicit_dtype(start: Start, tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "gpt2", architecture="gpt2", max_shard_size="60KB")
    worker = start()
    details = worker.load(folder, dtype="DTYPE_FLOAT32", device_map="cpu")
    assert (details.architecture, details.dtype_reason) == ("GPT2LMHeadModel", "asked for")
    assert dict(details.device_map) == {"": "cpu"}
    assert details.weight_bytes == 4 * details.parameter_count
    assert worker.generate(text="Hi", max_new_tokens=3, ignore_eos=True).finished is not None


def test_what_does_not_fit_into_the_planned_room_is_read_from_the_disk(
    start: Start, tiny_model: Path
) -> None:
    worker = start()
    details = worker.load(
        tiny_model,
        dtype="DTYPE_FLOAT32",
        device_map="sequential",
        offload="OFFLOAD_DISK",
        weight_room={"cpu": 400 << 10},
    )
    assert set(details.device_map.values()) == {"cpu", "disk"}
    assert 0 < details.offloaded_bytes < details.weight_bytes
    assert details.engine == "sequential"
    assert "offloaded layers" in details.engine_reason
    assert worker.generate(text="Hi", max_new_tokens=3, ignore_eos=True).finished is not None


def test_pickles_are_loaded_with_leave(start: Start, tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    worker = start()
    worker.load(folder, allow_pickle=True)
    assert worker.generate(text="Hello", max_new_tokens=2).finished is not None
