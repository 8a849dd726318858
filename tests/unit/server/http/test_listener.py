from __future__ import annotations

import asyncio
import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.responses import PlainTextResponse

from loaderd.server import cli
from loaderd.server.addresses import TcpAddress
from loaderd.server.http.listener import HttpListener
from tests.unit.server.box import Box
from tests.unit.server.http.browser import connect, fetch


def test_without_its_packages_it_says_which_extra_brings_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec

    def without_starlette(name: str) -> object:
        return None if name == "starlette" else find(name)

    monkeypatch.setattr(importlib.util, "find_spec", without_starlette)
    monkeypatch.setattr(sys, "argv", ["loaderd", "--http", "127.0.0.1:0"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == cli.EXIT_USAGE
    told = capsys.readouterr().err
    assert "(starlette)" in told
    assert "pip install 'loaderd[http]'" in told


def test_an_address_that_is_taken_ends_the_daemon(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        command = [sys.executable, "-m", "loaderd.server.cli", "--port", "0", "--http", address]
        done = subprocess.run(
            [*command, "--cache-dir", str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == cli.EXIT_ADDRESS
    assert f"cannot listen on {address} for HTTP" in done.stderr
    assert done.stdout == ""


async def test_the_url_tells_the_port_that_it_got() -> None:
    listener = HttpListener(TcpAddress("127.0.0.1", 0))
    host, _, port = listener.url.rpartition(":")
    assert host == "http://127.0.0.1"
    assert int(port) > 0
    await listener.stop(0)


async def test_an_exposed_listener_has_names_of_its_own() -> None:
    hosts = ("127.0.0.1", "0.0.0.0")
    inside, outside = (HttpListener(TcpAddress(host, 0)) for host in hosts)
    try:
        assert not inside.is_own_host("gpu-box")
        assert inside.is_own_host("localhost")
        assert outside.is_own_host("gpu-box")
    finally:
        await inside.stop(0)
        await outside.stop(0)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"x" * 70_000,
        b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_what_is_no_request_is_told_so_in_the_shape_of_all_errors(
    sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    listener = HttpListener(TcpAddress("127.0.0.1", 0))
    listener.start(PlainTextResponse("hello"))
    try:
        reader, writer = await connect(listener.url)
        writer.write(sent)
        async with asyncio.timeout(10):
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    finally:
        await listener.stop(0)
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "bad_request"
    assert caplog.text == ""


async def test_more_connections_than_there_is_room_for(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loaderd.server.http.listener._MAX_CONNECTIONS", 1)
    _, waiting = await connect(box.url)
    refused = await fetch(box.url, "/healthz")
    assert (refused.status, refused.error["code"]) == (503, "too_many_requests")
    assert refused.headers["retry-after"] == "1"
    assert refused.headers["x-request-id"]
    waiting.close()
    await waiting.wait_closed()
    monkeypatch.undo()
    metrics = (await fetch(box.url, "/metrics")).text
    assert 'loaderd_http_requests_total{code="503",route="/healthz"} 1.0' in metrics


async def test_a_connection_that_says_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loaderd.server.http.listener._FIRST_REQUEST_S", 0.05)
    listener = HttpListener(TcpAddress("127.0.0.1", 0))
    listener.start(PlainTextResponse("hello"))
    try:
        assert (await fetch(listener.url, "/")).text == "hello"
        reader, writer = await connect(listener.url)
        writer.write(b"GET / HTTP/1.1\r\nhost: local")
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.close()
    finally:
        await listener.stop(0)
