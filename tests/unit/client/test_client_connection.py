"""How the client finds its token, TLS and named daemons, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from loaderd.client import AsyncClient, Client, Tls, errors
from loaderd.client.connection import resolve_connection
from tests.fake_daemon import FakeDaemon

TOKEN = "loaderd_secret"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The client's file, which is not there yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "loaderd").mkdir()
    return tmp_path / "loaderd" / "client.toml"


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    "address", ["gpu-box:50051", "10.0.0.7:50051", "[2001:db8::1]:1", "dns:///localhost:1"]
)
def test_a_token_does_not_leave_the_box_without_tls(
    kind: type[Client] | type[AsyncClient], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="tls") as caught:
        kind(address, token=TOKEN)
    assert caught.value.field == "token"
    monkeypatch.setenv("LOADERD_TOKEN", TOKEN)
    with pytest.raises(errors.InvalidArgumentError, match="insecure"):
        kind(address)
    assert kind(address, insecure=True).address
    assert kind(address, tls=True).address


@pytest.mark.parametrize(
    "address", ["localhost", "127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "unix:/run/s", "/run/s"]
)
def test_on_the_box_it_may_go_without(address: str) -> None:
    assert Client(address, token=TOKEN).address


@pytest.mark.parametrize("token", ["", "a b", "a\n", "é", "a\x00"])
def test_what_is_no_token_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="printable ASCII") as caught:
        Client("localhost", token=token)
    assert caught.value.field == "token"


def test_a_token_is_in_no_representation(file: Path) -> None:
    file.write_text(f'[daemons.a]\naddress = "localhost"\ntoken = "{TOKEN}"\n')
    connection = resolve_connection(None, "a", None, None, insecure=False)
    assert connection.token == TOKEN
    client = Client(daemon="a")
    assert TOKEN not in repr(connection) + repr(client) + repr(client.raw) + str(vars(client))


def test_a_named_daemon(file: Path, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    (file.parent / "token").write_text(f"{TOKEN}\n")
    (file.parent / "ca.pem").write_text("a certificate")
    file.write_text(
        f'[daemons.here]\naddress = "{daemon.address}"\n'
        '[daemons.there]\naddress = "gpu-box"\ntoken_file = "token"\nca = "ca.pem"\n'
        '[daemons.open]\naddress = "gpu-box:1"\ntoken_file = "token"\ninsecure = true\n'
    )
    with Client(daemon="here") as client:
        assert client.models() == []
    there = resolve_connection(None, "there", None, None, insecure=False)
    assert (there.address, there.token) == ("gpu-box:50051", TOKEN)
    assert there.credentials is not None
    is_open = resolve_connection(None, "open", "own", None, insecure=False)
    assert (is_open.token, is_open.credentials) == ("own", None)
    monkeypatch.setenv("LOADERD_DAEMON", "there")
    assert Client().address == "gpu-box:50051"
    assert Client("localhost").address == "localhost:50051"
    monkeypatch.setenv("LOADERD_ADDRESS", daemon.address)
    assert Client().address == daemon.address


def test_the_token_of_the_environment_is_for_no_named_daemon(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOADERD_TOKEN", TOKEN)
    file.write_text('[daemons.a]\naddress = "gpu-box"\n')
    assert resolve_connection(None, "a", None, None, insecure=False).token is None
    assert resolve_connection("localhost", None, None, None, insecure=False).token == TOKEN
    assert resolve_connection("localhost", None, "own", None, insecure=False).token == "own"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read: No such file"),
        ("[", "cannot be read"),
        ("", r"has no table \[daemons.a\]"),
        ("daemons = 3", r"has no table \[daemons.a\]"),
        ("[daemons.a]", "needs an address"),
        ("[daemons.a]\naddress = 3\n", "address: must be a text"),
        ('[daemons.a]\naddress = "x"\ntls = "yes"\n', "tls: must be true or false"),
        (f'[daemons.a]\naddress = "x"\ntokens = "{TOKEN}"\n', "tokens: there is no such setting"),
        ('[daemons.a]\naddress = "x"\ntoken = "y"\ntoken_file = "z"\n', "not both"),
        ('[daemons.a]\naddress = "x"\ntoken_file = "z"\n', "token: cannot read .*z: No such file"),
        ('[daemons.a]\naddress = "x"\nca = "z"\n', "tls: cannot read .*z: No such file"),
        ('[daemons.a]\naddress = "x"\nca = "z"\ntls = false\n', "tls is false"),
        ('[daemons.a]\naddress = "x"\ntoken = "y"\n', "without protection"),
    ],
)
def test_a_named_daemon_that_is_wrong(file: Path, text: str | None, says: str) -> None:
    if text is not None:
        file.write_text(text)
    with pytest.raises(errors.InvalidArgumentError, match=says) as caught:
        Client(daemon="a")
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"address": "localhost", "daemon": "a"}, "daemon"),
        ({"address": "unix:/run/s", "tls": True}, "tls"),
        ({"address": "localhost", "tls": Tls(certificate="/a")}, "tls"),
        ({"address": "localhost", "tls": Tls(ca="/no/such/file")}, "tls"),
    ],
)
def test_what_does_not_go_together(arguments: dict[str, object], field: str) -> None:
    with pytest.raises(errors.InvalidArgumentError) as caught:
        Client(**arguments)  # type: ignore[arg-type]
    assert caught.value.field == field
