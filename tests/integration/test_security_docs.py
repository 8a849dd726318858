"""What docs/security.md shows works, one thing after the other."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loaderd.server.access.clients import parse_clients
from loaderd.server.access.roles import PERMISSIONS, Role
from loaderd.server.config import ServerConfig

PAGE = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
BLOCKS = re.findall(r"```(console|python)\n(.*?)```", PAGE, re.DOTALL)
PORT = "50051"


class Reader:
    """Does what the page says, in a folder of its own; one daemon runs at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = PORT
        self.printed = ""
        self._daemon: subprocess.Popen[str] | None = None
        self._environment = {
            name: value for name, value in os.environ.items() if not name.startswith("LOADERD_")
        } | {
            "HOME": str(folder),
            "HF_HUB_CACHE": str(folder / "cache"),
            "LOADERD_STANDBY": "0",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def follow(self, kind: str, block: str) -> None:
        if kind == "python":
            self._run([sys.executable, "-c", self._here(block)])
            return
        for command in block.removeprefix("$ ").split("\n$ "):
            if command.startswith("loaderd ") and not command.startswith("loaderd token"):
                self._start(command)
            else:
                self._run(["/bin/bash", "-e", "-o", "pipefail", "-c", self._here(command)])

    def stop(self) -> None:
        if self._daemon is not None:
            self._daemon.terminate()
            self._daemon.communicate(timeout=60)

    def _start(self, command: str) -> None:
        self.stop()
        # Tests listen on no address that others reach, and on a free port.
        command = command.replace(f"0.0.0.0:{PORT}", "127.0.0.1:0").replace(
            f"--port {PORT}", "--port 0"
        )
        assert PORT not in command
        self._daemon = subprocess.Popen(
            ["/bin/bash", "-c", f"exec {command}"],
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._daemon.stdout is not None
        line = self._daemon.stdout.readline()
        assert "listening on" in line
        self.port = line.strip().rpartition(":")[2]

    def _here(self, text: str) -> str:
        return text.replace(f"localhost:{PORT}", f"localhost:{self.port}")

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(
            command,
            capture_output=True,
            check=False,
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command[-1]}\n{done.stderr}"
        self.printed += done.stdout


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    reader = Reader(tmp_path)
    with contextlib.ExitStack() as stack:
        stack.callback(reader.stop)
        yield reader


def test_the_page_can_be_followed(reader: Reader) -> None:
    assert len(BLOCKS) > 7
    for kind, block in BLOCKS:
        reader.follow(kind, block)
    assert "ann user 'ann' has the role user, which may not call" in reader.printed
    assert (reader.folder / "clients.toml").read_text().count("token_sha256") == 2


def test_the_file_of_clients_that_it_shows_is_one() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    clients = parse_clients(text, Path("clients.toml"))
    assert [entry.name for entry in clients.clients] == ["ann", "ann"]
    limits = [clients.caller(entry).limits for entry in clients.clients]
    assert [(each.requests, each.models) for each in limits] == [(128, 2), (64, 2)]


def test_the_settings_and_roles_that_it_names_are_there() -> None:
    settings = {name.replace("_", "-") for name in ServerConfig.model_fields}
    table = PAGE[PAGE.index("## Which models") : PAGE.index("## Threats")]
    assert set(re.findall(r"^\| `--([a-z-]+)", table, re.MULTILINE)) <= settings
    roles = re.findall(r"^\| `(\w+)` \|", PAGE[: PAGE.index("## Which models")], re.MULTILINE)
    assert roles == [role for role in Role if role is not Role.ANONYMOUS]
    open_to_all = [path for path, roles in PERMISSIONS.items() if Role.ANONYMOUS in roles]
    assert [f"`{path[1:]}`" in PAGE for path in open_to_all] == [True]
