"""Where the client looks for the daemon."""

from __future__ import annotations

from pathlib import Path

import pytest

from loaderd.client import AsyncClient, Client, HealthStatus, errors
from tests.fake_daemon import FakeDaemon


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("localhost:50051", "localhost:50051"),
        ("gpu-box", "gpu-box:50051"),
        ("10.0.0.7:80", "10.0.0.7:80"),
        ("[::1]:50051", "[::1]:50051"),
        ("[::1]", "[::1]:50051"),
        ("unix:/run/loaderd.sock", "unix:/run/loaderd.sock"),
        ("/run/loaderd.sock", "unix:/run/loaderd.sock"),
        ("dns:///gpu-box:50051", "dns:///gpu-box:50051"),
    ],
)
def test_addresses_become_grpc_targets(address: str, target: str) -> None:
    with Client(address) as client:
        assert client.address == target


def test_the_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Client().address == "localhost:50051"
    monkeypatch.setenv("LOADERD_ADDRESS", "gpu-box:1")
    assert Client().address == AsyncClient().address == "gpu-box:1"
    assert Client("other:2").address == "other:2"
    monkeypatch.setenv("LOADERD_ADDRESS", "")
    assert Client().address == "localhost:50051"


@pytest.mark.parametrize(
    "address", ["", "http://localhost:50051", "host:port", "host:0", "host:65536", "::1", "a b:1"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="address") as caught:
        Client(address)
    assert caught.value.field == "address"


def test_a_unix_socket_works_both_ways(tmp_path: Path) -> None:
    socket = tmp_path / "loaderd.sock"
    with FakeDaemon(unix_socket=str(socket)):
        for address in (str(socket), f"unix:{socket}"):
            with Client(address) as client:
                assert client.health() is HealthStatus.SERVING


def test_a_web_proxy_is_not_asked(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with Client(daemon.address) as client:
        assert client.health() is HealthStatus.SERVING
