"""Start, stop, signals, addresses."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from loaderd.client import Client, HealthStatus, errors
from tests.daemon import SpawnedDaemon
from tests.waiting import until

Spawn = Callable[..., SpawnedDaemon]

ENDLESS = {"max_new_tokens": 8000, "ignore_eos": True}


def run_loaderd(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loaderd.server.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
        check=False,
    )


def test_it_says_where_it_listens_and_stops_cleanly(spawn: Spawn) -> None:
    daemon = spawn()
    assert daemon.ready_line.startswith("loaderd ")
    assert "listening on 127.0.0.1:" in daemon.ready_line
    workers = daemon.workers()
    assert daemon.stop() == 0
    assert not any(worker.is_running() for worker in workers)
    assert "Traceback" not in daemon.log


def test_the_daemon_imports_no_torch(shared_daemon: SpawnedDaemon) -> None:
    maps = Path(f"/proc/{shared_daemon.process.pid}/maps").read_text()
    assert "grpc" in maps
    assert "libtorch" not in maps


def test_a_taken_port_is_told_in_one_line(shared_daemon: SpawnedDaemon) -> None:
    port = shared_daemon.address.rpartition(":")[2]
    result = run_loaderd("--port", port)
    assert result.returncode == 3
    assert result.stderr.count("\n") == 1
    assert f"127.0.0.1:{port}" in result.stderr


def test_bad_settings_are_told_in_one_line(tmp_path: Path) -> None:
    result = run_loaderd("--port", "99999")
    assert result.returncode == 2
    assert result.stderr.startswith("loaderd: port:")
    assert result.stderr.count("\n") == 1
    assert run_loaderd("--no-such-flag").returncode == 2
    assert run_loaderd(LOADERD_STANDBY="many").returncode == 2
    assert run_loaderd("--config", str(tmp_path / "none.toml")).returncode == 2
    assert run_loaderd("--host", "0.0.0.0").returncode == 2
    refused = run_loaderd("--port", "0", "--preload", "a/b", "--deny-model", "a/*")
    assert refused.returncode == 2
    assert "a/b is to be loaded at the start, but" in refused.stderr


def test_a_unix_socket_serves_and_survives_a_daemon_that_was_killed(
    spawn: Spawn, tmp_path: Path
) -> None:
    path = tmp_path / "loaderd.sock"
    first = SpawnedDaemon(tmp_path, ["--socket", str(path), "--standby", "0"])
    assert path.stat().st_mode & 0o777 == 0o600
    with Client(f"unix:{path}") as client:
        assert client.health() is HealthStatus.SERVING
    second = run_loaderd("--socket", str(path))
    assert second.returncode == 3
    first.stop(signal.SIGKILL)
    assert path.exists()
    arguments = ["--socket", str(path), "--standby", "0"]
    with SpawnedDaemon(tmp_path, arguments) as third, Client(f"unix:{path}") as client:
        assert client.info().pid == third.process.pid
    assert not path.exists()


def test_sigterm_lets_a_running_stream_finish(spawn: Spawn, real_model: Path) -> None:
    daemon = spawn("--allow-local", str(real_model.parent), "--standby", "0")
    with Client(daemon.address) as client:
        model = client.load(str(real_model))
        with model.stream("One, two,", max_new_tokens=60, ignore_eos=True) as stream:
            next(iter(stream))
            daemon.process.send_signal(signal.SIGTERM)
            until(lambda: "draining" in daemon.log)
            with pytest.raises((errors.DrainingError, errors.DaemonUnreachableError)):
                model.generate("Hello")
            list(stream)
            assert stream.result.usage.generated_tokens == 60
    assert daemon.process.wait(60) == 0


def test_a_stream_that_outlasts_the_drain_time_is_cut(spawn: Spawn, real_model: Path) -> None:
    roots = ("--allow-local", str(real_model.parent))
    daemon = spawn(*roots, "--standby", "0", "--drain-timeout", "0.5")
    with Client(daemon.address) as client:
        model = client.load(str(real_model))
        workers = daemon.workers()
        with model.stream("One, two,", max_new_tokens=8000, ignore_eos=True) as stream:
            next(iter(stream))
            daemon.process.send_signal(signal.SIGTERM)
            with pytest.raises(errors.DrainingError):
                list(stream)
    assert daemon.process.wait(60) == 0
    assert not any(worker.is_running() for worker in workers)
    assert "Traceback" not in daemon.log


def test_a_load_under_way_ends_with_draining(spawn: Spawn, real_model: Path) -> None:
    daemon = spawn("--allow-local", str(real_model.parent), "--standby", "0")
    with Client(daemon.address) as client:
        load = client.start_load(str(real_model))
        next(iter(load))
        daemon.process.send_signal(signal.SIGTERM)
        with pytest.raises(errors.DrainingError):
            load.result()
    assert daemon.process.wait(60) == 0


def test_a_watch_does_not_hold_the_daemon(spawn: Spawn) -> None:
    daemon = spawn("--standby", "0")
    with Client(daemon.address) as client, client.watch() as watch:
        next(iter(watch))
        daemon.process.send_signal(signal.SIGTERM)
        with pytest.raises(errors.DrainingError):
            list(watch)
    assert daemon.process.wait(60) == 0


def test_a_second_signal_ends_it_at_once(spawn: Spawn, real_model: Path) -> None:
    daemon = spawn("--allow-local", str(real_model.parent), "--standby", "0")
    with Client(daemon.address) as client:
        model = client.load(str(real_model))
        workers = daemon.workers()
        with model.stream("One, two,", max_new_tokens=8000, ignore_eos=True) as stream:
            next(iter(stream))
            daemon.process.send_signal(signal.SIGINT)
            until(lambda: "draining" in daemon.log)
            time.sleep(1)  # two signals at once are one request
            daemon.process.send_signal(signal.SIGINT)
            assert daemon.process.wait(30) == 128 + signal.SIGINT
    psutil.wait_procs(workers, timeout=10)
    assert not any(worker.is_running() for worker in workers)


@pytest.fixture
def runtime() -> Iterator[Path]:
    """A short path: a socket's must fit below it."""
    with tempfile.TemporaryDirectory(prefix="run-") as folder:
        yield Path(folder)


def test_workers_end_with_a_daemon_that_was_killed(
    spawn: Spawn, real_model: Path, runtime: Path
) -> None:
    environment = {"XDG_RUNTIME_DIR": str(runtime)}
    daemon = spawn("--allow-local", str(real_model.parent), **environment)
    with Client(daemon.address) as client:
        model = client.load(str(real_model))
        until(lambda: client.info().standby_workers == 1)
        workers = daemon.workers()
        assert len(workers) == 2
        with model.stream("One, two,", max_new_tokens=8000, ignore_eos=True) as stream:
            next(iter(stream))
            daemon.process.kill()
            with pytest.raises(errors.LoaderdError) as caught:
                list(stream)
            assert isinstance(caught.value, errors.DaemonUnreachableError)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []
    left = list(runtime.iterdir())
    assert len(left) == 1
    again = spawn("--standby", "0", **environment)
    assert left[0] not in list(runtime.iterdir())
    assert again.stop() == 0
    assert list(runtime.iterdir()) == []


def test_the_token_is_in_no_worker_and_no_log(spawn: Spawn) -> None:
    secret = "hf_" + "s" * 30
    daemon = spawn(HF_TOKEN=secret)
    with Client(daemon.address) as client:
        until(lambda: client.info().standby_workers == 1)
    for worker in daemon.workers():
        assert secret not in " ".join(worker.cmdline())
        assert secret not in str(worker.environ())
        assert worker.environ()["HF_HUB_OFFLINE"] == "1"
    assert secret not in daemon.log


def test_small_calls_are_answered_while_a_model_loads(
    shared_daemon: SpawnedDaemon, real_model: Path
) -> None:
    answers = 0
    with Client(shared_daemon.address) as client:
        for _ in range(5):  # a warm load may be over before the first call
            load = client.start_load(str(real_model))
            model_id = next(iter(load)).model_id
            while not any(
                model.info.id == model_id and model.info.state.name == "READY"
                for model in client.models()
            ):
                assert client.health() is HealthStatus.SERVING
                answers += 1
                time.sleep(0.01)
            load.result().unload()
            if answers:
                return
    pytest.fail("no call was made while a model loaded")


def test_an_oversized_message_leaves_the_connection_alive(shared_daemon: SpawnedDaemon) -> None:
    with Client(shared_daemon.address) as client:
        with pytest.raises(errors.LoaderdError) as caught:
            client.load("x" * (5 << 20))
        assert caught.value.code.name == "RESOURCE_EXHAUSTED"
        assert client.health() is HealthStatus.SERVING


def test_garbage_on_the_port_does_no_harm(shared_daemon: SpawnedDaemon) -> None:
    host, _, port = shared_daemon.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
    with Client(shared_daemon.address) as client:
        assert client.health() is HealthStatus.SERVING
