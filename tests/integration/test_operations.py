"""A daemon as a service manager has it: it is told of its state, and has settings read again."""

import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from loaderd.client import Client, errors
from tests.daemon import SpawnedDaemon

PATIENCE_S = 60


class Manager:
    """Hears what the daemon says."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(PATIENCE_S)

    def next(self) -> dict[str, str]:
        """The next that is no sign of life."""
        while True:
            lines = self._socket.recv(4096).decode().split("\n")
            if lines != ["WATCHDOG=1"]:
                return dict(line.split("=", 1) for line in lines)

    def until_beats(self) -> None:
        """Waits for a sign of life."""
        assert self._socket.recv(4096) == b"WATCHDOG=1"

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    opened = Manager(tmp_path / "notify")
    yield opened
    opened.close()


def test_a_daemon_tells_its_manager_and_reads_its_settings_again(
    tmp_path: Path, manager: Manager
) -> None:
    file = tmp_path / "loaderd.toml"
    file.write_text("standby = 0\n")
    (tmp_path / "models").mkdir()
    daemon = SpawnedDaemon(
        tmp_path,
        ["--config", str(file)],
        {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000"},
        wrapper=["env", "-u", "LOADERD_LOG_LEVEL"],
    )

    def reload(settings: str) -> str:
        file.write_text(settings)
        os.kill(daemon.process.pid, signal.SIGHUP)
        begun = manager.next()
        assert begun["RELOADING"] == "1"
        assert int(begun["MONOTONIC_USEC"]) > 0
        done = manager.next()
        assert done["READY"] == "1"
        return done["STATUS"]

    with daemon, Client(daemon.address) as client:
        ready = manager.next()
        assert ready == {"READY": "1", "STATUS": f"listening on {daemon.address}"}
        manager.until_beats()

        settings = f'standby = 0\nallow_local = ["{tmp_path}/models"]\ndeny_model = ["org/*"]\n'
        done = reload(settings + "offline = true\nkeep_alive = 7\n")
        assert done.endswith("changed: deny_model, allow_local, offline, keep_alive")
        assert client.info().local_roots == (f"{tmp_path}/models",)
        assert client.info().offline
        with pytest.raises(errors.ModelNotAllowedError):
            client.cache.resolve("org/name")

        done = reload("standby = 2\nkeep_alive = 'x'\nprot = 1\n")
        assert "the settings stay as they are" in done
        assert "the settings stay as they are: keep_alive: " in daemon.log
        assert "the settings stay as they are: prot: " in daemon.log
        with pytest.raises(errors.ModelNotAllowedError):
            client.cache.resolve("org/name")

        done = reload("standby = 2\nheartbeat_timeout = 30\n")
        assert done.endswith("need a restart: standby, heartbeat_timeout")
        assert "these settings need a restart to change: standby, heartbeat_timeout" in daemon.log
        assert len(client.info().local_roots) == 1
        assert not daemon.workers()

        (tmp_path / "clients.toml").write_text("")
        before = daemon.log.count("read the settings again")
        quiet = f'standby = 0\nlog_level = "warning"\nclients = "{tmp_path}/clients.toml"\n'
        done = reload(quiet)
        assert "clients" in done
        assert "log_level" in done
        assert daemon.log.count("read the settings again") == before
        with pytest.raises(errors.UnauthenticatedError):
            client.info()

        done = reload(quiet + 'hub_token_file = "/no/such/file"\n')
        assert "hub_token_file: cannot read /no/such/file" in done
        done = reload(quiet + 'tls_cert = "/no/such/cert"\ntls_key = "/no/such/key"\n')
        assert "tls_cert, tls_key: " in done
        with pytest.raises(errors.UnauthenticatedError):
            client.info()

        os.kill(daemon.process.pid, signal.SIGTERM)
        assert manager.next()["STOPPING"] == "1"
        assert daemon.stop() == 0
    assert "Traceback" not in daemon.log


def test_a_daemon_whose_terminal_is_closed_stops(tmp_path: Path) -> None:
    terminal = pexpect.spawn(
        sys.executable,
        ["-m", "loaderd.server.cli", "--port", "0", "--standby", "0"],
        env=os.environ | {"HF_HOME": str(tmp_path)},
        timeout=PATIENCE_S,
    )
    terminal.expect("listening on")
    os.kill(terminal.pid, signal.SIGHUP)
    terminal.expect("read the settings again; changed: nothing")
    os.close(terminal.child_fd)
    _, status = os.waitpid(terminal.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
