"""What docs/sdk.md and docs/cli.md show works, and their tables are those of the code."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loaderd.cli.exits import MEANINGS
from loaderd.cli.main import app
from loaderd.client import errors
from tests.fake_daemon import FakeDaemon

DOCS = Path(__file__).parents[3] / "docs"
SDK, CLI = (DOCS / "sdk.md").read_text(), (DOCS / "cli.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", SDK, re.DOTALL)
COMMANDS = [
    line.removeprefix("$ ")
    for block in re.findall(r"```console\n(.*?)```", CLI, re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_runs(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, snippet: str) -> None:
    monkeypatch.setenv("LOADERD_ADDRESS", daemon.address)
    printed = io.StringIO()

    with contextlib.redirect_stdout(printed):
        exec(compile(snippet, "docs/sdk.md", "exec"), {"__name__": "__main__"})

    assert daemon.calls
    assert printed.getvalue() or "print" not in snippet


def test_the_commands_run(daemon: FakeDaemon, tmp_path: Path) -> None:
    """One after the other, in one shell, with pipes and all."""
    environment = {
        **os.environ,
        "LOADERD_ADDRESS": daemon.address,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    assert len(COMMANDS) > 15
    # ps and unload follow a load that an earlier block has undone.
    script = "\n".join(["set -e -o pipefail", *COMMANDS])
    run = subprocess.run(
        ["/bin/bash", "-c", script],
        capture_output=True,
        check=False,
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=120,
    )

    assert run.returncode == 0, run.stderr
    assert (tmp_path / "answer.txt").read_text().startswith("[1] you said: Summarize")


def test_the_exit_codes_are_all_there() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", CLI, re.MULTILINE)

    assert rows == [(str(int(code)), text) for code, text in MEANINGS.items()]


def test_the_errors_are_all_there() -> None:
    rows = dict(re.findall(r"^\| `(\w+Error)` \| (\w+) \|", SDK, re.MULTILINE))
    kinds = {
        kind.__name__: kind
        for kind in vars(errors).values()
        if isinstance(kind, type)
        and issubclass(kind, errors.LoaderdError)
        and kind is not errors.LoaderdError
        and not kind.__name__.startswith("_")
    }

    assert rows == {name: kind.code.name for name, kind in kinds.items()}


def test_the_commands_are_all_described() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        assert re.search(rf"\*\*`{command.callback.__name__}\b", CLI)
