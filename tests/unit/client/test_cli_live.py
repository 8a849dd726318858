"""What goes on being shown: ps --watch and top, on a terminal and in pipes; and show."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import IO

import pytest

from loaderd.cli.exits import ExitCode
from loaderd.client import Client
from tests.fake_daemon import FakeDaemon, models
from tests.unit.client.ctl import Ctl, document
from tests.unit.client.terminal import CTRL_C, WAIT_S, Spawn

Process = subprocess.Popen[str]
Pipe = Callable[..., Process]
"""Starts `loaderctl` with its output in pipes."""


@pytest.fixture
def pipe(daemon: FakeDaemon) -> Iterator[Pipe]:
    with ExitStack() as stack:

        def start(*args: str) -> Process:
            command = [sys.executable, "-m", "loaderd.cli", "-a", daemon.address, *args]
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def read(stream: IO[str] | None, count: int) -> list[str]:
    assert stream is not None
    return [stream.readline().rstrip("\n") for _ in range(count)]


def test_a_piped_watch_tells_each_change_its_time_and_its_reason(
    client: Client, pipe: Pipe
) -> None:
    client.load("demo/base")
    process = pipe("ps", "--watch")
    assert read(process.stdout, 1) == ["demo/base (m-1): ready"]

    client.load("demo/chat").unload()

    changes = [line.split(" ", 1)[1] for line in read(process.stdout, 5)]
    assert changes == [
        "demo/chat (m-2): resolving, load",
        "demo/chat (m-2): resolving -> loading after 20 ms, load",
        "demo/chat (m-2): loading -> ready after 20 ms, load: "
        "25 ms in all (resolve 5 ms, weights 15 ms)",
        "demo/chat (m-2): ready -> unloading after 20 ms, unload",
        "demo/chat (m-2): unloading -> unloaded after 20 ms, unload",
    ]
    process.send_signal(signal.SIGINT)
    assert process.wait(WAIT_S) == ExitCode.OK
    assert process.communicate() == ("", "")


def test_a_piped_watch_as_json_is_an_object_a_line(client: Client, pipe: Pipe) -> None:
    process = pipe("ps", "--watch", "--json")
    first = json.loads(*read(process.stdout, 1))
    client.load("demo/chat")

    assert first == {"type": "list", "models": []}
    event = json.loads(read(process.stdout, 2)[-1])
    assert (event["previous_duration"], event["reason"]) == (0.02, "load")


@pytest.mark.parametrize("args", [("ps", "--watch"), ("top",), ("top", "--json")])
def test_what_goes_on_ends_with_the_daemon(
    daemon: FakeDaemon, client: Client, pipe: Pipe, args: tuple[str, ...]
) -> None:
    client.load("demo/chat")
    process = pipe(*args)
    read(process.stdout, 1)

    daemon.stop()

    _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == ExitCode.UNAVAILABLE
    (line,) = errors.splitlines()
    assert line.startswith("loaderctl: ")


def test_a_watch_on_a_terminal_changes_in_its_place(client: Client, spawn: Spawn) -> None:
    child = spawn("ps", "--watch")
    child.expect("no models are loaded")

    model = client.load("demo/chat")
    child.expect("SINCE")
    child.expect(r"demo/chat +m-1 +ready +\d")
    child.expect(re.escape("demo/chat (m-1): loading -> ready after 20 ms, load: 25 ms in all"))
    model.unload()
    child.expect("no models are loaded")
    child.expect(re.escape("unloading -> unloaded after 20 ms, unload"))

    child.send(CTRL_C)
    assert child.ending() == ExitCode.OK


@pytest.mark.parametrize("args", [("ps", "--watch"), ("top", "--interval", "1s")])
def test_a_terminal_is_left_when_the_daemon_goes(
    daemon: FakeDaemon, client: Client, spawn: Spawn, args: tuple[str, ...]
) -> None:
    client.load("demo/chat")
    child = spawn(*args)
    child.expect("demo/chat")

    daemon.stop()

    child.expect("loaderctl: ")
    assert child.ending() == ExitCode.UNAVAILABLE


def test_top_shows_models_devices_and_the_daemon(
    ctl: Ctl, client: Client, daemon: FakeDaemon
) -> None:
    client.load("demo/base")
    model = client.load("demo/chat", keep_alive=-1)
    model.generate("one two", max_new_tokens=5)
    stream = model.stream("x", max_new_tokens=50_000)
    next(stream)

    shown = ctl("top", "--once").stdout.splitlines()

    heading = "loaderd 0.1.0, up 1 min 2 s, 1 request, 1 client, 1 standby worker"
    assert shown[0] == heading
    columns = "NAME ID STATE REPLICAS ENGINE RUNNING QUEUED IN/S OUT/S KV PREFIX HITS UNTIL"
    assert " ".join(shown[1].split()) == columns
    assert " ".join(shown[2].split()).startswith("demo/base m-1 ready 1 fake 0 0 0.0 0.0 0% -")
    assert " ".join(shown[3].split()) == "demo/chat m-2 ready 1 fake 1 0 7.0 5.0 0% 0% pinned"
    assert " ".join(shown[4].split()) == "DEVICE TOTAL RESERVED TAKEN FREE"
    assert " ".join(shown[6].split()) == "cpu 17.2 GB 104.0 MB 104.0 MB 12.9 GB"
    stream.cancel()


def test_top_as_json(ctl: Ctl, client: Client, pipe: Pipe) -> None:
    client.load("demo/chat").generate("one two", max_new_tokens=5)

    sample = document(ctl("top", "--once", "--json"))

    assert set(sample) == {"daemon", "models", "devices"}
    assert sample["daemon"]["clients"] == 1
    assert sample["devices"][-1]["taken_bytes"] == 52_000_000
    statistics = sample["models"][0]["statistics"]
    assert (statistics["generated_tokens"], statistics["kv_capacity_tokens"]) == (5, 10_000)
    lines = read(pipe("top", "--json", "--interval", "1s").stdout, 2)
    assert [json.loads(line)["models"][0]["id"] for line in lines] == ["m-1", "m-1"]


def test_top_on_a_terminal_looks_again_and_again(client: Client, spawn: Spawn) -> None:
    child = spawn("top", "--interval", "1s")
    child.expect("loaderd 0.1.0, up 1 min 2 s")
    child.expect("cuda:0")

    client.load("demo/chat")
    child.expect(r"demo/chat +m-1 +ready +1 +fake")

    child.send(CTRL_C)
    assert child.ending() == ExitCode.OK


@pytest.mark.parametrize("text", ["0s", "500ms", "2h", "fast", ""])
def test_an_interval_out_of_bounds_is_refused(ctl: Ctl, text: str) -> None:
    refused = ctl("top", f"--interval={text}")
    assert refused.exit_code == ExitCode.USAGE
    assert "--interval" in refused.stderr


def test_show_tells_all_of_a_model(ctl: Ctl, client: Client) -> None:
    client.load("demo/chat").generate("one two", max_new_tokens=5)

    lines = ctl("show", "m-1").stdout.splitlines()

    shown = dict(re.split(" {2,}", line, maxsplit=1) for line in lines)
    assert (shown["name"], shown["state"]) == ("demo/chat", "ready")
    assert shown["dtype"] == "bfloat16: this CPU computes it natively"
    assert (shown["loaded in"], shown["steps"]) == ("25 ms", "resolve 5 ms, weights 15 ms")
    assert shown["generated tokens"] == "5, 5.0/s"
    assert shown["keys and values"] == "0 of 10,000 tokens"
    assert shown["memory"] == "60.0 MB planned, 52.0 MB taken by its load"
    assert shown["replica 1"] == "process 4242 holds 52.0 MB now, 0 running, 0 queued"
    assert document(ctl("show", "demo/chat", "--json"))["timings"]["weights"] == 0.015
    assert ctl("show", "demo/none").exit_code == ExitCode.PRECONDITION


def test_show_tells_of_an_engine_without_bounds_for_keys_and_values(
    ctl: Ctl, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "KV_CAPACITY_TOKENS", 0)  # as of one request after the other
    client.load("demo/chat").generate("one two", max_new_tokens=5)

    shown = ctl("show", "m-1")

    assert shown.exit_code == 0
    assert "generated tokens" in shown.stdout
    assert "keys and values" not in shown.stdout
