"""The commands on model files on a terminal: bars, questions, Ctrl-C."""

from __future__ import annotations

import re

import pytest

from loaderd.cli.exits import ExitCode
from tests.fake_daemon import FakeDaemon
from tests.fake_daemon.cache import WEIGHTS
from tests.unit.client.terminal import CTRL_C, CTRL_D, WAIT_S, Spawn
from tests.waiting import until


def test_each_file_that_comes_has_a_line(daemon: FakeDaemon, spawn: Spawn) -> None:
    daemon.step_s = 0.15
    child = spawn("pull", "demo/remote")

    child.expect("downloading demo/remote")
    child.expect(re.escape("0%  0 B of 2.0 MB  tokenizer.json"))
    child.expect(re.escape(f"16%  6.0 MB of 38.0 MB  {WEIGHTS}"))
    child.expect(re.escape("16.0 MB of 40.0 MB, 25.0 MB/s, 1.0 s left"))
    child.expect(re.escape(f"37%  14.0 MB of 38.0 MB  {WEIGHTS}"))
    child.expect("demo/remote is cached at commit")
    assert child.ending() == ExitCode.OK


def test_a_pull_that_is_interrupted_says_that_the_next_goes_on(
    daemon: FakeDaemon, spawn: Spawn
) -> None:
    daemon.step_s = 0.15
    child = spawn("pull", "demo/remote")
    child.expect(re.escape("8.0 MB of 40.0 MB"))

    child.send(CTRL_C)

    child.expect(re.escape("what came is kept: `loaderctl pull demo/remote` goes on from there"))
    child.expect("loaderctl: interrupted")
    assert child.ending() == ExitCode.INTERRUPTED
    until(lambda: "demo/remote" in daemon.cache.orphans)
    daemon.step_s = 0.005
    again = spawn("pull", "demo/remote")
    again.expect("went on from [0-9.]+ MB that were there already")
    assert again.ending() == ExitCode.OK


@pytest.mark.parametrize("command", [("rm", "demo/chat"), ("prune", "--max-size", "125MB")])
def test_what_goes_is_shown_and_asked_for(
    daemon: FakeDaemon, spawn: Spawn, command: tuple[str, ...]
) -> None:
    before = set(daemon.cache.cached)
    child = spawn(*command)

    child.expect("REPOSITORY")
    child.expect("40.0 MB +40.0 MB +goes")
    child.expect(re.escape("delete 1 snapshot, 40.0 MB? [y/N] "))
    assert daemon.cache.cached == before
    child.sendline("y")

    child.expect(re.escape("deleted 1 snapshot, 40.0 MB; the cache takes 120.0 MB now"))
    assert child.ending() == ExitCode.OK
    assert len(daemon.cache.cached) == len(before) - 1


@pytest.mark.parametrize("answer", ["\n", "n\n", "yeah\n", CTRL_D])
def test_all_but_a_yes_deletes_nothing(daemon: FakeDaemon, spawn: Spawn, answer: str) -> None:
    before = set(daemon.cache.cached)
    child = spawn("rm", "demo/chat")
    child.expect(re.escape("[y/N] "))

    child.send(answer)

    child.expect("\r\nloaderctl: nothing was deleted")
    assert child.ending() == ExitCode.FAILED
    assert daemon.cache.cached == before


def test_ctrl_c_at_the_question_deletes_nothing(daemon: FakeDaemon, spawn: Spawn) -> None:
    before = set(daemon.cache.cached)
    child = spawn("rm", "demo/chat")
    child.expect(re.escape("[y/N] "))

    child.send(CTRL_C)

    child.expect("loaderctl: interrupted")
    assert child.ending() == ExitCode.INTERRUPTED
    assert daemon.cache.cached == before


def test_nothing_to_prune_is_not_asked_for(spawn: Spawn) -> None:
    child = spawn("prune", "--unreferenced")

    child.expect("^loaderctl: there is nothing to delete\r\n")
    assert child.ending() == ExitCode.OK


def test_json_on_a_terminal_needs_yes_too(daemon: FakeDaemon, spawn: Spawn) -> None:
    child = spawn("rm", "demo/chat", "--json")

    child.expect("give --yes to delete files with --json")
    assert child.ending() == ExitCode.USAGE
    assert daemon.calls == []


def test_a_bar_shows_the_verification(daemon: FakeDaemon, spawn: Spawn) -> None:
    daemon.step_s = 0.15
    child = spawn("verify", "demo/chat")

    child.expect("verifying demo/chat")
    child.expect("━")
    child.expect(re.escape("2.0 MB of 40.0 MB, 500.0 MB/s"))
    child.expect("demo/chat is sound: 3 files, 40.0 MB")
    assert child.ending() == ExitCode.OK


def test_ctrl_c_cancels_a_verification(daemon: FakeDaemon, spawn: Spawn) -> None:
    daemon.step_s = 1.0
    child = spawn("verify", "demo/chat")
    child.expect("verifying demo/chat")

    child.send(CTRL_C)

    child.expect("loaderctl: interrupted")
    assert child.ending() == ExitCode.INTERRUPTED
    assert daemon.last("VerifySnapshot").cancelled.wait(WAIT_S)
