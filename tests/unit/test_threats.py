"""docs/security.md names tests for each threat, and they are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from loaderd.cli.main import app as loaderctl
from loaderd.server.config import ServerConfig
from tests.names import names_of_tests

PAGE = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
ROWS = [
    [cell.strip() for cell in line.split(" | ")]
    for line in PAGE[PAGE.index("## Threats") :].splitlines()
    if line.startswith("| ") and not line.startswith("| Threat")
]


def test_no_option_of_either_program_takes_a_token() -> None:
    """What stands in a command line, all users of the box can read."""
    options = {
        option
        for command in _commands(get_command(loaderctl))
        for parameter in command.params
        for option in parameter.opts
    }
    assert "--token-file" in options
    options |= {f"--{name.replace('_', '-')}" for name in ServerConfig.model_fields}
    about_tokens = {option for option in options if option.endswith(("token", "token-file"))}
    assert about_tokens == {"--token-file", "--hub-token-file"}


def _commands(command: Any) -> Iterator[Any]:
    yield command
    for each in getattr(command, "commands", {}).values():
        yield from _commands(each)


def test_every_threat_names_tests_that_there_are() -> None:
    assert len(ROWS) >= 20
    for threat, _, tests in ROWS:
        named = set(re.findall(r"`(\w+)`", tests))
        assert named, threat
        assert named <= names_of_tests(), (threat, named - names_of_tests())
