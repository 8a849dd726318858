"""`loaderctl` on a terminal and in pipes: a spawned daemon, the real model, the local hub."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import SpawnedDaemon
from tests.hub import Hub, HubRepo, faults
from tests.unit.client.terminal import CTRL_C, Terminal


@pytest.fixture(scope="module")
def hub(real_model: Path) -> Iterator[Hub]:
    with Hub(HubRepo.from_folder("demo/SmolLM2", real_model)) as hub:
        # So slow that the bar moves, so quick that nobody waits.
        hub.inject(faults.throttle(150e6), path="*/model.safetensors")
        yield hub


@pytest.fixture(scope="module")
def address(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("cli")
    with SpawnedDaemon(folder, ["--standby", "0"], {"HF_ENDPOINT": hub.url}) as daemon:
        yield daemon.address


@pytest.fixture
def loaderctl(address: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "loaderd.cli", "--address", address, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def as_json(result: subprocess.CompletedProcess[str]) -> Any:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_life_from_the_first_question_to_the_end(
    address: str, loaderctl: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    plan = as_json(loaderctl("resolve", "demo/SmolLM2", "--json"))
    assert "model.safetensors" in json.dumps(plan)

    options = ["--max-new-tokens", "40", "--temperature", "0", "--stats"]
    question = ["run", "demo/SmolLM2", "Why is the sky blue?"]
    with Terminal("--address", address, *question, *options) as terminal:
        terminal.expect("downloading")
        terminal.expect("━")
        terminal.expect("loading")
        terminal.expect("sky")
        terminal.expect("tokens/s")
        assert terminal.ending() == 0

    (model,) = as_json(loaderctl("ps", "--json"))
    assert (model["name"], model["state"]) == ("demo/SmolLM2", "ready")
    snapshots = as_json(loaderctl("ls", "--json"))
    assert "demo/SmolLM2" in json.dumps(snapshots)
    assert as_json(loaderctl("info", "--json"))["version"]
    assert as_json(loaderctl("devices", "--json"))
    seen = as_json(loaderctl("top", "--once", "--json"))
    assert seen["models"][0]["statistics"]["generated_tokens"] == 40
    assert seen["models"][0]["timings"]["engine"] > 0
    assert seen["devices"][-1]["taken_bytes"] > 0
    assert seen["daemon"]["clients"] >= 1
    assert re.search(r"steps +.*weights \d", loaderctl("show", "demo/SmolLM2").stdout)

    piped = loaderctl("run", "demo/SmolLM2", "-", "--max-new-tokens", "8", stdin="Say hello.")
    assert piped.returncode == 0
    assert piped.stdout.strip()

    assert loaderctl("health", "demo/SmolLM2").returncode == 0
    with Terminal("--address", address, "ps", "--watch") as terminal:
        terminal.expect(f"demo/SmolLM2 +{model['id']} +ready")
        unloaded = loaderctl("unload", "demo/SmolLM2")
        assert unloaded.returncode == 0
        assert re.search(r"\d [MG]B freed", unloaded.stdout)
        terminal.expect("ready -> unloading after .*, unload")
        terminal.expect("no models are loaded")
        terminal.send(CTRL_C)
        assert terminal.ending() == 0
    assert as_json(loaderctl("ps", "--json")) == []


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("load", "demo/none"), 3),
        (("load", "no good name"), 4),
        (("load", "/etc"), 4),
        (("unload", "demo/none"), 6),
        (("--no-such-option",), 2),
    ],
)
def test_errors_are_one_line_and_their_kind_is_the_exit_code(
    loaderctl: Callable[..., subprocess.CompletedProcess[str]],
    arguments: tuple[str, ...],
    code: int,
) -> None:
    result = loaderctl(*arguments)
    assert result.returncode == code
    assert "Traceback" not in result.stderr
    if code != 2:
        lines = [line for line in result.stderr.splitlines() if "resolving" not in line]
        assert len(lines) == 1
        assert lines[0].startswith("loaderctl: ")


def test_no_daemon_is_told_with_its_address() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "loaderd.cli", "--address", "127.0.0.1:1", "ps"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 5
    assert "127.0.0.1:1" in result.stderr
