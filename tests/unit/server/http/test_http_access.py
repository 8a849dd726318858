"""Who may do what over HTTP: tokens, roles and limits are those of gRPC."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import openai as api
import pytest
from starlette.responses import PlainTextResponse

from loaderd.server.access.roles import Role
from loaderd.server.addresses import TcpAddress
from loaderd.server.config import ConfigError
from loaderd.server.http.listener import HttpListener
from loaderd.server.http.tls import server_context
from loaderd.server.models.record import LoadOptions
from loaderd.server.rpc.tls import ServerTls
from tests.certificates import HERE, Authority
from tests.unit.server.http.browser import fetch
from tests.unit.server.http.gate import Gate, open_gate
from tests.unit.server.test_tls import greet


@pytest.fixture
async def gate(tmp_path: Path) -> AsyncIterator[Gate]:
    """A daemon that knows clients, with a model."""
    async with open_gate(tmp_path) as opened:
        async for _ in opened.box.loads.load(str(opened.box.folder), LoadOptions()):
            pass
        yield opened


async def test_a_token_is_the_key_of_the_api(gate: Gate) -> None:
    async with gate.openai(Role.USER) as openai:
        answer = await openai.completions.create(model=str(gate.box.folder), prompt="count 2")
        assert answer.choices[0].text == "0 1 "
    assert gate.box.launcher.workers[0].clients == ["some-user"]


async def test_who_has_no_token_or_a_wrong_one_is_not_known(gate: Gate) -> None:
    body = {"model": str(gate.box.folder), "prompt": "count 1"}
    for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic eDp5"}):
        reply = await fetch(gate.box.url, "/v1/completions", body, **header)
        assert reply.status == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        assert (reply.error["type"], reply.error["code"]) == (
            "authentication_error",
            "unauthenticated",
        )


async def test_who_watches_generates_nothing(gate: Gate) -> None:
    async with gate.openai(Role.MONITOR) as openai:
        assert [model.id async for model in openai.models.list()] == [str(gate.box.folder)]
        for stream in (False, True):
            with pytest.raises(api.PermissionDeniedError) as caught:
                await openai.completions.create(
                    model=str(gate.box.folder), prompt="count 1", stream=stream
                )
            assert (caught.value.type, caught.value.code) == ("permission_error", "forbidden")


async def test_what_a_client_may_have_counts_over_http_too(gate: Gate) -> None:
    async with gate.openai(Role.USER) as openai:
        model = str(gate.box.folder)
        first = await openai.completions.create(model=model, prompt="hang", stream=True)
        with pytest.raises(api.RateLimitError) as caught:
            await openai.completions.create(model=model, prompt="count 1", stream=True)
        assert caught.value.code == "client_limit"
        assert caught.value.response.headers["x-should-retry"] == "true"
        await first.close()


@pytest.mark.parametrize(
    ("path", "anonymous", "monitor"),
    [
        ("/healthz", 200, 200),  # what asks these, such as a load balancer, often has no secrets
        ("/readyz", 200, 200),
        ("/", 200, 200),  # has no more than its script, which shows a token for the rest
        ("/metrics", 401, 200),
        ("/status/server", 401, 200),
        ("/status/models", 401, 200),
        ("/status/devices", 401, 200),
        ("/status/cache", 401, 200),
        ("/v1/models", 401, 200),
    ],
)
async def test_what_needs_a_token(gate: Gate, path: str, anonymous: int, monitor: int) -> None:
    assert await gate.status(path, None) == anonymous
    assert await gate.status(path, Role.MONITOR) == monitor


async def _ask(listener: HttpListener, trusted: Path) -> str:
    """Who the daemon's certificate is for, to a client that trusts an authority."""
    context = ssl.create_default_context(cafile=str(trusted))
    port = urlsplit(listener.url).port
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    writer.write(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    async with asyncio.timeout(10):
        assert (await reader.read()).endswith(b"hello")
    names = dict(pair[0] for pair in writer.get_extra_info("peercert")["subject"])
    writer.close()
    return str(names["commonName"])


async def test_a_certificate_is_used_also_when_it_is_replaced(tmp_path: Path) -> None:
    ours = Authority(tmp_path, "ours")
    server = ours.sign("first", HERE).install(tmp_path, "server")
    tls = ServerTls(server.certificate, server.key, None)
    listener = HttpListener(TcpAddress("127.0.0.1", 0), server_context(tls))
    assert listener.url.startswith("https://127.0.0.1:")
    listener.start(PlainTextResponse("hello"))
    try:
        assert await _ask(listener, ours.certificate) == "first"
        ours.sign("second", HERE).install(tmp_path, "server")
        assert await _ask(listener, ours.certificate) == "second"
        server.key.write_text("no key")  # what does not fit together changes nothing
        assert await _ask(listener, ours.certificate) == "second"
        with pytest.raises(ssl.SSLCertVerificationError):
            await _ask(listener, Authority(tmp_path, "theirs").certificate)
    finally:
        await listener.stop(0)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
async def test_old_versions_of_tls_are_refused_over_http_too(tmp_path: Path) -> None:
    server = Authority(tmp_path, "ours").sign("first", HERE).install(tmp_path, "server")
    tls = ServerTls(server.certificate, server.key, None)
    listener = HttpListener(TcpAddress("127.0.0.1", 0), server_context(tls))
    listener.start(PlainTextResponse("hello"))
    address = listener.url.removeprefix("https://")
    try:
        assert await greet(address, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await greet(address, ssl.TLSVersion.TLSv1_1)
    finally:
        await listener.stop(0)


def test_files_of_tls_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"TLS.*none.pem"):
        server_context(ServerTls(tmp_path / "none.pem", tmp_path / "none.key", None))
