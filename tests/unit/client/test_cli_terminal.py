"""`loaderctl` on a terminal: bars, the chat, Ctrl-C."""

from __future__ import annotations

import re

import pytest

from loaderd.cli.exits import ExitCode
from loaderd.client import Client
from tests.fake_daemon import FakeDaemon
from tests.fake_daemon.cache import EXAMPLE
from tests.unit.client.terminal import CTRL_C, CTRL_D, WAIT_S, Spawn

PROMPT = ">>> "


def test_a_bar_shows_the_download(daemon: FakeDaemon, spawn: Spawn) -> None:
    daemon.step_s = 0.15
    child = spawn("pull", "demo/remote")

    child.expect("downloading demo/remote")
    child.expect("━")  # the bar
    child.expect(re.escape("16.0 MB of 40.0 MB, 25.0 MB/s, 1.0 s left"))
    child.expect("demo/remote is cached at commit")
    assert child.ending() == ExitCode.OK


@pytest.mark.parametrize("columns", [80, 60])
def test_a_bar_is_whole_on_a_narrow_terminal(
    daemon: FakeDaemon, spawn: Spawn, columns: int
) -> None:
    daemon.step_s = 0.15
    daemon.cache.cached.remove(EXAMPLE)
    child = spawn("pull", EXAMPLE, columns=columns)

    child.expect(f"downloading {EXAMPLE}")
    child.expect("━")
    child.expect(re.escape("16.0 MB of 40.0 MB, 25.0 MB/s, 1.0 s left"))
    child.expect("is cached at commit")
    assert child.ending() == ExitCode.OK


def test_a_name_that_is_too_long_is_cut_and_the_bar_is_not(
    daemon: FakeDaemon, spawn: Spawn
) -> None:
    daemon.step_s = 0.15
    daemon.cache.cached.remove(EXAMPLE)
    child = spawn("pull", EXAMPLE, columns=45)

    child.expect("downloading HuggingFaceTB/[^…]+…")
    child.expect("━")
    child.expect(re.escape("16.0 MB of 40.0 MB, 25.0 MB/s, 1.0 s left"))
    assert child.ending() == ExitCode.OK


def test_a_spinner_shows_the_state(daemon: FakeDaemon, spawn: Spawn) -> None:
    daemon.step_s = 0.15
    child = spawn("load", "demo/remote")

    child.expect("resolving demo/remote")
    child.expect("downloading demo/remote")
    child.expect("[^n]loading demo/remote")
    child.expect("demo/remote is ready as m-1")
    assert child.ending() == ExitCode.OK


@pytest.mark.parametrize(
    ("args", "method", "shown"),
    [
        (("load", "demo/stuck"), "LoadModel", "loading"),
        (("pull", "demo/stalled"), "DownloadModel", "downloading"),
        (("run", "demo/base", "x", "--max-new-tokens", "50000"), "StreamGenerate", "[a-z]{5}"),
        (("watch",), "WatchModels", None),
    ],
)
def test_ctrl_c_cancels_and_ends(
    daemon: FakeDaemon, spawn: Spawn, args: tuple[str, ...], method: str, shown: str | None
) -> None:
    child = spawn(*args)
    call = daemon.last(method)
    if shown is not None:
        child.expect(shown)

    child.send(CTRL_C)

    child.expect("loaderctl: interrupted")
    assert child.ending() == ExitCode.INTERRUPTED
    assert call.cancelled.wait(WAIT_S)


def test_ctrl_c_in_mid_answer_ends_the_line(client: Client, spawn: Spawn) -> None:
    client.load("demo/base")
    child = spawn("run", "demo/base", "x", "--max-new-tokens", "50000")
    child.expect("[a-z]{5}")

    child.send(CTRL_C)

    child.expect("[a-z ^C]\r\nloaderctl: interrupted")


def test_a_failure_in_mid_answer_ends_the_line(client: Client, spawn: Spawn) -> None:
    client.load("demo/base")
    child = spawn("run", "demo/base", "x", "--max-new-tokens", "50000")
    child.expect("[a-z]{5}")

    client.unload("demo/base", force=True)

    child.expect("[a-z ]\r\nloaderctl: model unloaded")
    assert child.ending() == ExitCode.FAILED


def test_an_answer_that_the_default_limit_ends_says_so(spawn: Spawn) -> None:
    child = spawn("run", "demo/base", "Once")

    child.expect("[a-z ]\r\nloaderctl: stopped at 256 tokens; --max-new-tokens for more")
    assert child.ending() == ExitCode.OK


def test_an_unknown_command_is_no_prompt(daemon: FakeDaemon, spawn: Spawn) -> None:
    child = spawn("run", "demo/chat")
    child.expect(PROMPT)
    for line in ("/help", "/clear all", "/"):
        child.sendline(line)
        child.expect(f"there is no {line}; the commands are /clear and /exit")
        child.expect(PROMPT)
    assert [call.method for call in daemon.calls].count("StreamGenerate") == 0

    child.sendline("/etc/passwd is a file")
    child.expect(re.escape("[1] you said: /etc/passwd is a file"))


def test_a_chat_remembers_forgets_and_ends(daemon: FakeDaemon, spawn: Spawn) -> None:
    child = spawn("run", "demo/chat", "--system", "Be brief.")

    child.expect(PROMPT)
    child.sendline("hello")
    child.expect(re.escape("[2] you said: hello"))
    child.expect(PROMPT)
    child.sendline("again")
    child.expect(re.escape("[4] you said: again"))
    messages = daemon.last("StreamGenerate").request.messages.messages
    assert [(m.role, m.content) for m in messages] == [
        ("system", "Be brief."),
        ("user", "hello"),
        ("assistant", "[2] you said: hello"),
        ("user", "again"),
    ]

    child.expect(PROMPT)
    child.sendline("   ")  # nothing was said
    child.expect(PROMPT)
    child.sendline("/clear")
    child.expect(PROMPT)
    child.sendline("new")
    child.expect(re.escape("[2] you said: new"))

    child.expect(PROMPT)
    child.sendline("/exit")
    assert child.ending() == ExitCode.OK


def test_ctrl_d_leaves_the_chat(spawn: Spawn) -> None:
    child = spawn("run", "demo/chat")
    child.expect(PROMPT)

    child.send(CTRL_D)

    assert child.ending() == ExitCode.OK


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(daemon: FakeDaemon, spawn: Spawn) -> None:
    daemon.token_s = 0.05
    child = spawn("run", "demo/chat")
    child.expect(PROMPT)
    child.sendline("a long story " * 20)
    child.expect(re.escape("[1] you said: a long"))

    child.send(CTRL_C)

    child.expect("\r\nloaderctl: stopped")
    assert daemon.last("StreamGenerate").cancelled.wait(WAIT_S)
    daemon.token_s = 0.0
    child.expect(PROMPT)
    child.sendline("go on")
    child.expect(re.escape("[3] you said: go on"))  # what came of the answer is remembered

    child.expect(PROMPT)
    child.send(CTRL_C)  # at the prompt it only drops the line
    child.expect(PROMPT)
    child.sendline("/exit")
    assert child.ending() == ExitCode.OK


def test_a_failure_keeps_the_chat(daemon: FakeDaemon, spawn: Spawn) -> None:
    child = spawn("run", "demo/chat", "--temperature", "1000")
    child.expect(PROMPT)
    child.sendline("hello")

    child.expect("loaderctl: invalid argument: field temperature")
    child.expect(PROMPT)
    child.sendline("/exit")
    assert child.ending() == ExitCode.OK


def test_a_chat_loads_its_model_again(daemon: FakeDaemon, client: Client, spawn: Spawn) -> None:
    child = spawn("run", "demo/chat")
    child.expect(PROMPT)
    client.unload("demo/chat")

    child.sendline("hello")

    child.expect(re.escape("[1] you said: hello"))
    child.expect(PROMPT)
    assert [model.id for model in client.models()] == ["m-2"]


def test_a_chat_with_a_model_without_template_continues_text(
    daemon: FakeDaemon, spawn: Spawn
) -> None:
    child = spawn("run", "demo/base", "--max-new-tokens", "4", "--stats")
    child.expect(PROMPT)
    child.sendline("Once")

    child.expect("4 generated")
    child.expect(PROMPT)
    assert daemon.last("StreamGenerate").request.text == "Once"


def test_a_table_is_folded_into_the_terminal(client: Client, spawn: Spawn) -> None:
    client.load("demo/chat")
    child = spawn("ps")

    child.expect("NAME")
    child.expect("demo/chat")
    assert child.ending() == ExitCode.OK
