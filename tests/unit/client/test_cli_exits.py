"""How `loaderctl` ends: a line on stderr and an exit code."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from loaderd.cli.exits import MEANINGS, ExitCode
from loaderd.cli.main import app
from loaderd.client.errors import BY_REASON
from tests.fake_daemon import FakeDaemon
from tests.unit.client.ctl import Ctl

EXPECTED_CODES = {
    "MODEL_NOT_FOUND": 3,
    "REVISION_NOT_FOUND": 3,
    "MODEL_GATED": 8,
    "INVALID_NAME": 4,
    "INVALID_ARGUMENT": 4,
    "UNSUPPORTED_OPTION": 4,
    "HUB_UNREACHABLE": 5,
    "HUB_RATE_LIMITED": 5,
    "OFFLINE_NOT_CACHED": 6,
    "MODEL_IN_USE": 6,
    "MODEL_NOT_LOADED": 6,
    "MODEL_UNSUPPORTED": 6,
    "SNAPSHOT_CORRUPT": 9,
    "SNAPSHOT_INCOMPLETE": 9,
    "DISK_FULL": 7,
    "DEVICE_MEMORY": 7,
    "QUEUE_FULL": 7,
    "SLOW_CONSUMER": 7,
    "WORKER_DIED": 5,
    "DRAINING": 5,
    "DEADLINE": 10,
    "INTERNAL": 1,
    "HUB_UNAUTHORIZED": 8,
    "SNAPSHOT_NOT_FOUND": 3,
    "SNAPSHOT_IN_USE": 6,
    "CACHE_LIMIT": 7,
    "CACHE_NOT_WRITABLE": 6,
    "DOWNLOAD_CANCELLED": 1,
    "DOWNLOAD_INTERRUPTED": 5,
    "LEASE_NOT_FOUND": 3,
    "UNAUTHENTICATED": 8,
    "FORBIDDEN": 8,
    "CLIENT_LIMIT": 7,
    "MODEL_NOT_ALLOWED": 8,
    "MODEL_TOO_LARGE": 8,
    "MODEL_UNLOADED": 1,
}


@pytest.mark.parametrize("reason", BY_REASON)
def test_each_failure_is_a_line_and_an_exit_code(ctl: Ctl, reason: str) -> None:
    result = ctl("load", f"fail/{reason.lower().replace('_', '-')}")

    assert result.exit_code == EXPECTED_CODES[reason]
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"loaderctl: {reason.lower().replace('_', ' ')}")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("lod",), "Did you mean 'load'"),
        (("load",), "loaderctl load --help"),
        (("load", "a/b", "--dtype", "int8"), "'--dtype': 'int8' is not one of 'float16'"),
        (("load", "a/b", "--nonsense"), "--nonsense"),
        (("--timeout", "soon", "ps"), "--timeout"),
        (("load", "a/b", "--replicas", "0"), "'0' is no number of replicas; write one from 1 on"),
        (("load", "a/b", "--replicas", "two"), "'two' is no number of replicas"),
        (("unload", "a/b", "--grace", "5s"), "--grace: goes with --force"),
    ],
)
def test_wrong_usage_is_a_line(ctl: Ctl, args: tuple[str, ...], text: str) -> None:
    result = ctl(*args)

    assert result.exit_code == ExitCode.USAGE
    (line,) = result.stderr.splitlines()
    assert line.startswith("loaderctl: ")
    assert text in line
    assert "--help" in line


def test_no_daemon_is_a_line() -> None:
    result = CliRunner().invoke(app, ["-a", "127.0.0.1:1", "ps"])

    assert result.exit_code == ExitCode.UNAVAILABLE
    (line,) = result.stderr.splitlines()
    assert line == (
        "loaderctl: no loaderd daemon answers at 127.0.0.1:1; start one with `loaderd`, or give "
        "its address, for example in LOADERD_ADDRESS"
    )


@pytest.mark.parametrize("args", [("run", "demo/chat", b"\xff\xfe"), ("run", "demo/chat")])
def test_a_prompt_that_is_not_unicode_is_a_line(
    daemon: FakeDaemon, args: tuple[str | bytes, ...]
) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "loaderd.cli", "-a", daemon.address, *args],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:strict"},
        input=b"\xff\xfe",
        timeout=60,
    )

    assert run.returncode == ExitCode.INVALID
    assert run.stderr == b"loaderctl: PROMPT: is not valid Unicode text\n"
    assert daemon.calls == []


def test_a_deadline_is_a_line(ctl: Ctl) -> None:
    result = ctl("--timeout", "0.2", "load", "demo/stuck")

    assert result.exit_code == ExitCode.DEADLINE
    assert "0.2 s" in result.stderr.splitlines()[-1]


def test_the_address_comes_from_the_environment(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOADERD_ADDRESS", daemon.address)

    assert CliRunner().invoke(app, ["health"]).stdout == "serving\n"


def test_version_and_help() -> None:
    version = CliRunner().invoke(app, ["--version"])
    helped = CliRunner().invoke(app, ["--help"])
    bare = CliRunner().invoke(app, [])

    assert (version.exit_code, version.stdout) == (ExitCode.OK, "loaderctl 0.1.0\n")
    words = " ".join(helped.stdout.split())
    for code, meaning in MEANINGS.items():
        assert f"{code} {meaning}" in words
    assert (bare.exit_code, helped.exit_code) == (ExitCode.OK, ExitCode.OK)
    assert "Commands" in bare.stdout


def test_a_reader_that_has_enough_is_no_defect(daemon: FakeDaemon) -> None:
    command = f"{sys.executable} -m loaderd.cli -a {daemon.address} run demo/base x | head -c 3"
    run = subprocess.run(
        ["/bin/sh", "-c", command], capture_output=True, check=False, text=True, timeout=60
    )

    assert len(run.stdout) == 3
    assert "Traceback" not in run.stderr
    assert daemon.last("StreamGenerate").cancelled.wait(10)
