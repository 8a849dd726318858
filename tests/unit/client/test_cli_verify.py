"""The command verify: bad files by name, and an exit code for what remains."""

from __future__ import annotations

import json

from loaderd.cli.exits import ExitCode
from loaderd.v1 import cache_pb2
from tests.fake_daemon import FakeDaemon
from tests.fake_daemon.cache import WEIGHTS
from tests.unit.client.ctl import Ctl

BAD_WEIGHTS = cache_pb2.FileProblem(
    path=WEIGHTS,
    kind=cache_pb2.PROBLEM_KIND_CONTENT,
    expected="sha256 aa",
    found="sha256 bb",
)


def test_verify_of_what_is_sound(ctl: Ctl) -> None:
    result = ctl("verify", "demo/chat", "demo/base")

    assert result.exit_code == ExitCode.OK
    assert result.stdout.splitlines() == [
        "demo/chat is sound: 3 files, 40.0 MB",
        "demo/base is sound: 3 files, 40.0 MB",
    ]
    assert "demo/base: verifying 40.0 MB of 40.0 MB, 500.0 MB/s" in result.stderr


def test_verify_names_each_bad_file(ctl: Ctl, daemon: FakeDaemon) -> None:
    daemon.cache.problems = {"demo/chat": [BAD_WEIGHTS]}

    result = ctl("verify", "demo/chat", "demo/base")

    assert result.exit_code == ExitCode.DATA_LOSS
    assert result.stdout.splitlines() == [
        "demo/chat: model.safetensors: content, expected sha256 aa, found sha256 bb",
        "demo/chat has 1 bad file; `loaderctl verify --repair demo/chat` fetches what is bad again",
        "demo/base is sound: 3 files, 40.0 MB",
    ]
    as_json = ctl("verify", "demo/base", "demo/chat", "--json")
    assert as_json.exit_code == ExitCode.DATA_LOSS
    sound, bad = json.loads(as_json.stdout)
    assert (sound["ok"], bad["ok"]) == (True, False)
    assert [(each["path"], each["kind"]) for each in bad["problems"]] == [(WEIGHTS, "content")]
    assert bad["snapshot"]["repo_id"] == "demo/chat"


def test_verify_repairs(ctl: Ctl, daemon: FakeDaemon) -> None:
    daemon.cache.problems = {"demo/chat": [BAD_WEIGHTS]}
    daemon.cache.hub_answers = False
    assert ctl("verify", "demo/chat", "--repair").exit_code == ExitCode.UNAVAILABLE
    daemon.cache.hub_answers = True

    result = ctl("verify", "demo/chat", "--repair")

    assert result.exit_code == ExitCode.OK
    assert result.stdout.splitlines()[-1] == "demo/chat is sound again: 1 bad file repaired"
    assert "demo/chat: repairing 40.0 MB of 40.0 MB" in result.stderr
    assert ctl("verify", "demo/chat").stdout == "demo/chat is sound: 3 files, 40.0 MB\n"


def test_verify_names_files_that_cannot_be_verified(ctl: Ctl, daemon: FakeDaemon) -> None:
    daemon.cache.unverifiable = {"demo/chat": ["config.json"]}

    result = ctl("verify", "demo/chat")

    assert result.exit_code == ExitCode.OK
    assert result.stdout.splitlines() == [
        "demo/chat: config.json has no known hash; it was not checked",
        "demo/chat is sound: 2 files, 40.0 MB",
    ]


def test_verify_of_what_is_not_there(ctl: Ctl) -> None:
    assert ctl("verify", "demo/remote").exit_code == ExitCode.NOT_FOUND
