"""What a service manager hears."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from loaderd.server.systemd import Systemd


def listening(address: str) -> socket.socket:
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(address)
    manager.settimeout(30)
    return manager


def test_it_hears_of_each_step_and_workers_do_not_inherit_its_address(tmp_path: Path) -> None:
    environment = {"NOTIFY_SOCKET": str(tmp_path / "s"), "WATCHDOG_USEC": "1", "PATH": "/bin"}
    with listening(str(tmp_path / "s")) as manager:
        systemd = Systemd(environment)
        systemd.ready("listening on x")
        systemd.reloading()
        systemd.stopping()
        heard = [manager.recv(4096).decode().split("\n") for _ in range(3)]
    assert heard[0] == ["READY=1", "STATUS=listening on x"]
    assert heard[1][0] == "RELOADING=1"
    name, _, moment = heard[1][1].partition("=")
    assert name == "MONOTONIC_USEC"
    assert int(moment) > 0
    assert heard[2][0] == "STOPPING=1"
    assert environment == {"PATH": "/bin"}


def test_an_abstract_address() -> None:
    name = f"loaderd-test-{os.getpid()}"
    with listening(f"\0{name}") as manager:
        Systemd({"NOTIFY_SOCKET": f"@{name}"}).ready("x")
        assert manager.recv(4096).startswith(b"READY=1")


@pytest.mark.parametrize(("watched", "beats"), [("", True), ("me", True), ("1", False)])
async def test_the_watchdog_hears_from_the_process_that_it_watches(
    tmp_path: Path, watched: str, beats: bool
) -> None:
    environment = {"NOTIFY_SOCKET": str(tmp_path / "s"), "WATCHDOG_USEC": "1000"}
    if watched:
        environment["WATCHDOG_PID"] = str(os.getpid()) if watched == "me" else watched
    with listening(str(tmp_path / "s")) as manager:
        systemd = Systemd(environment)
        watch = asyncio.create_task(systemd.watch())
        if beats:
            heard = [await asyncio.to_thread(manager.recv, 4096) for _ in range(3)]
            assert heard == [b"WATCHDOG=1"] * 3
        else:
            await watch  # there is nothing to do
            manager.setblocking(False)
            with pytest.raises(BlockingIOError):
                manager.recv(4096)
        watch.cancel()


async def test_nobody_listens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Systemd({}).ready("x")
    await Systemd({"WATCHDOG_USEC": "1"}).watch()
    assert not caplog.text
    Systemd({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready("x")
    assert "cannot tell systemd READY=1: No such file" in caplog.text.replace("[Errno 2] ", "")
