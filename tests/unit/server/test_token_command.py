"""`loaderd token create`, as an operator runs it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from loaderd.server.access.clients import ClientsFile
from loaderd.server.access.roles import Role
from loaderd.server.errors import UnauthenticatedError


def create(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LOADERD_")}
    return subprocess.run(
        [sys.executable, "-m", "loaderd.server.cli", "token", "create", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment | variables,
    )


def test_it_prints_a_token_once_and_keeps_its_hash_alone(tmp_path: Path) -> None:
    file = tmp_path / "clients.toml"
    first = create("ann", "--role", "user", "--clients", str(file))
    second = create("ann", "--role", "admin", "--expires", "2d", LOADERD_CLIENTS=str(file))
    assert "shown only now" in first.stderr
    tokens = [run.stdout.strip() for run in (first, second)]
    assert all(token.startswith("loaderd_") and len(token) > 50 for token in tokens)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    clients = ClientsFile(file)
    callers = [clients.of_token(token) for token in tokens]
    assert [(each.name, each.role) for each in callers] == [("ann", Role.USER), ("ann", Role.ADMIN)]
    assert not any(token in file.read_text() for token in tokens)
    later = ClientsFile(file, lambda: datetime.now(UTC) + timedelta(days=2))
    assert later.of_token(tokens[0])
    with pytest.raises(UnauthenticatedError, match="expired"):
        later.of_token(tokens[1])


def test_it_adds_to_what_an_operator_wrote(tmp_path: Path) -> None:
    file = tmp_path / "clients.toml"
    entry = '[[clients]]\nname = "a"\nrole = "user"\ncertificate = "a"'
    file.write_text(f"[limits]\nstreams = 3\n{entry}")
    token = create("b", "--role", "monitor", "--clients", str(file)).stdout.strip()
    clients = ClientsFile(file)
    assert clients.of_token(token).limits.streams == 3
    assert clients.of_certificate(["a"])


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--role", "user"], 1, "--clients or LOADERD_CLIENTS"),
        (["--role", "boss", "--clients", "x"], 2, "invalid choice: 'boss'"),
        (["--role", "user", "--clients", "x", "--expires", "soon"], 2, "'soon' is no span"),
        (["--clients", "x"], 2, "--role"),
        (
            ["--role", "user", "--clients", "/no/such/folder/x"],
            1,
            "cannot write to /no/such",
        ),
        (["--role", "user", "--clients", "/dev/null/x"], 1, "/dev/null/x"),
    ],
)
def test_what_it_cannot_do_is_said(arguments: list[str], code: int, says: str) -> None:
    done = create("ann", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["", "a b", "a:1", "-a", "x" * 65, 'a"'])
def test_a_name_is_of_few_characters(tmp_path: Path, name: str) -> None:
    file = tmp_path / "clients.toml"
    done = create("--role", "user", "--clients", str(file), "--", name)
    assert done.returncode == 2
    assert "letters, digits" in done.stderr
    assert not file.exists()


@pytest.mark.parametrize("text", ["clients = []\n", "[[clients]]\nname = 3\n", "["])
def test_a_file_to_which_nothing_can_be_added_stays_as_it_is(tmp_path: Path, text: str) -> None:
    file = tmp_path / "clients.toml"
    file.write_text(text)
    done = create("ann", "--role", "user", "--clients", str(file))
    assert (done.returncode, done.stdout) == (1, "")
    assert str(file) in done.stderr
    assert file.read_text() == text
