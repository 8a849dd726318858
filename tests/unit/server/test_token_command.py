"""`loaderd token create`, as an operator runs it."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from loaderd.server.access.clients import ClientsFile
from loaderd.server.access.roles import Role
from loaderd.server.cli import main
from loaderd.server.errors import UnauthenticatedError


@dataclass
class Run:
    """How the command ended, and what it printed."""

    code: int
    stdout: str
    stderr: str


Create = Callable[..., Run]


@pytest.fixture
def create(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Create:
    for name in [name for name in os.environ if name.startswith("LOADERD_")]:
        monkeypatch.delenv(name)

    def create(*arguments: str) -> Run:
        monkeypatch.setattr(sys, "argv", ["loaderd", "token", "create", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return Run(int(ended.value.code or 0), *capsys.readouterr())

    return create


def test_it_prints_a_token_once_and_keeps_its_hash_alone(
    create: Create, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "clients.toml"
    first = create("ann", "--role", "user", "--clients", str(file))
    monkeypatch.setenv("LOADERD_CLIENTS", str(file))
    second = create("ann", "--role", "admin", "--expires", "2d")
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


def test_it_adds_to_what_an_operator_wrote(create: Create, tmp_path: Path) -> None:
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
def test_what_it_cannot_do_is_said(
    create: Create, arguments: list[str], code: int, says: str
) -> None:
    done = create("ann", *arguments)
    assert (done.code, done.stdout) == (code, "")
    assert says in done.stderr


@pytest.mark.parametrize("name", ["", "a b", "a:1", "-a", "x" * 65, 'a"'])
def test_a_name_is_of_few_characters(create: Create, tmp_path: Path, name: str) -> None:
    file = tmp_path / "clients.toml"
    done = create("--role", "user", "--clients", str(file), "--", name)
    assert done.code == 2
    assert "letters, digits" in done.stderr
    assert not file.exists()


@pytest.mark.parametrize("text", ["clients = []\n", "[[clients]]\nname = 3\n", "["])
def test_a_file_to_which_nothing_can_be_added_stays_as_it_is(
    create: Create, tmp_path: Path, text: str
) -> None:
    file = tmp_path / "clients.toml"
    file.write_text(text)
    done = create("ann", "--role", "user", "--clients", str(file))
    assert (done.code, done.stdout) == (1, "")
    assert str(file) in done.stderr
    assert file.read_text() == text
