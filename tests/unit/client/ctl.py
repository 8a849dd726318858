"""`loaderctl` in this process, without a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from typer.testing import CliRunner, Result

from loaderd.cli.exits import ExitCode
from loaderd.cli.main import app

Ctl = Callable[..., Result]
"""Runs `loaderctl` with the arguments given; `stdin` is what is piped in."""


def ctl_for(address: str) -> Ctl:
    """Runs against the daemon at `address`."""

    def run(*args: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(app, ["--address", address, *args], input=stdin)

    return run


def document(result: Result) -> Any:
    """What a command with --json printed that ended well."""
    assert result.exit_code == ExitCode.OK
    return json.loads(result.stdout)
