"""A daemon that asks who calls: over TLS with tokens, and over a socket."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from loaderd.cli.main import app
from loaderd.client import AsyncClient, Client, HealthStatus, ModelList, Tls, errors
from loaderd.server.access.command import create_token
from loaderd.v1 import model_pb2
from tests.certificates import HERE, Authority
from tests.daemon import SpawnedDaemon

HINT = "whether the CA that was given signed"


@dataclass
class Secured:
    """The daemon, and what gets somebody into it."""

    daemon: SpawnedDaemon
    address: str
    socket: Path
    clients: Path
    folder: Path
    ca: Authority
    tokens: dict[str, str]

    @property
    def tls(self) -> Tls:
        return Tls(ca=self.ca.certificate)

    def client(self, role: str) -> Client:
        return Client(self.address, token=self.tokens[role], tls=self.tls)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    ca = Authority(folder, "ca")
    server = ca.sign("first", HERE).install(folder, "server")
    clients = folder / "clients.toml"
    tokens = {role: create_token(clients, role, role, None) for role in ("admin", "user")}
    socket = folder / "loaderd.sock"
    arguments = [
        *("--listen", f"unix:{socket}", "--socket-mode", "0660", "--socket-role", "monitor"),
        *("--socket-group", str(os.getgid())),
        *("--tls-cert", str(server.certificate), "--tls-key", str(server.key)),
        *("--clients", str(clients), "--standby", "0", "--allow-model", "org/*"),
    ]
    with SpawnedDaemon(folder, arguments) as daemon:
        address = daemon.ready_line.split()[-3]
        yield Secured(daemon, address, socket, clients, folder, ca, tokens)


def test_it_says_all_addresses_and_no_token(secured: Secured) -> None:
    assert secured.daemon.ready_line.endswith(f"{secured.address} and unix:{secured.socket}")
    for token in secured.tokens.values():
        assert token not in secured.daemon.log + secured.clients.read_text()


def test_a_token_is_needed_and_goes_with_every_kind_of_call(secured: Secured) -> None:
    with secured.client("user") as client:
        assert client.models() == []
        with client.watch() as updates:
            assert isinstance(next(updates), ModelList)
        request, raw = model_pb2.ListModelsRequest(), client.raw.models.ListModels
        answers = (raw(request), raw.with_call(request)[0], raw.future(request).result())
        assert [list(answer.models) for answer in answers] == [[], [], []]
        with pytest.raises(errors.ModelNotLoadedError):
            client.model("org/name")
        with pytest.raises(errors.ForbiddenError) as caught:
            client.cache.download("org/name")
        assert (caught.value.client, caught.value.role) == ("user", "user")
        with pytest.raises(errors.ModelNotAllowedError):
            client.load("other/name")
    with Client(secured.address, tls=secured.tls) as stranger:
        assert stranger.health() is HealthStatus.SERVING
        with pytest.raises(errors.UnauthenticatedError):
            stranger.models()


async def test_so_it_does_with_the_asyncio_client(secured: Secured) -> None:
    token = secured.tokens["user"]
    async with AsyncClient(secured.address, token=token, tls=secured.tls) as client:
        assert await client.models() == []
        async with client.watch() as updates:
            assert isinstance(await anext(aiter(updates)), ModelList)
        with pytest.raises(errors.ForbiddenError):
            await client.cache.prune(orphans=True)
    async with AsyncClient(secured.address, token="wrong", tls=secured.tls) as stranger:
        with pytest.raises(errors.UnauthenticatedError) as caught:
            await stranger.models()
        assert "wrong" not in f"{caught.value} {caught.value.metadata}"


def test_who_does_not_trust_the_certificate_or_speaks_no_tls_gets_nowhere(
    secured: Secured, tmp_path: Path
) -> None:
    stranger = Tls(ca=Authority(tmp_path, "stranger").certificate)
    with (
        Client(secured.address, token=secured.tokens["user"], tls=stranger) as client,
        pytest.raises(errors.DaemonUnreachableError, match=HINT),
    ):
        client.models()
    with Client(secured.address) as client, pytest.raises(errors.DaemonUnreachableError):
        client.models()


def test_the_socket_has_its_mode_and_role(secured: Secured) -> None:
    found = secured.socket.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, os.getgid())
    with Client(f"unix:{secured.socket}") as client:
        assert client.models() == []
        with pytest.raises(errors.ForbiddenError, match="monitor"):
            client.unload("org/name")
    with (
        Client(f"unix:{secured.socket}", token=secured.tokens["admin"]) as client,
        pytest.raises(errors.ModelNotLoadedError),
    ):
        client.unload("org/name")


def test_loaderctl_knows_the_daemon_by_name(secured: Secured, tmp_path: Path) -> None:
    folder = tmp_path / "loaderd"
    folder.mkdir()
    (folder / "token").write_text(secured.tokens["user"] + "\n")
    (folder / "client.toml").write_text(
        f'[daemons.box]\naddress = "{secured.address}"\ntoken_file = "token"\n'
        f'ca = "{secured.ca.certificate}"\n'
    )
    own = {"XDG_CONFIG_HOME": str(tmp_path)}
    assert loaderctl("--daemon", "box", "ps", **own).exit_code == 0
    assert loaderctl("ps", LOADERD_DAEMON="box", **own).exit_code == 0
    refused = loaderctl("--daemon", "box", "prune", "--orphans", "--yes", **own)
    assert refused.exit_code == 8
    assert "'user' has the role user" in refused.stderr
    at = ("--address", secured.address, "--tls-ca", str(secured.ca.certificate))
    assert loaderctl(*at, "ps").exit_code == 8
    assert loaderctl(*at, "ps", LOADERD_TOKEN=secured.tokens["user"]).exit_code == 0
    assert loaderctl(*at, "--token-file", str(folder / "token"), "ps").exit_code == 0


def loaderctl(*arguments: str, **variables: str) -> Result:
    return CliRunner().invoke(app, arguments, env=variables)


def test_grpcurl_with_a_token_over_tls(secured: Secured) -> None:
    def grpcurl(*arguments: str) -> subprocess.CompletedProcess[str]:
        program = shutil.which("grpcurl", path=str(Path(sys.executable).parent))
        assert program, "grpcurl is not installed: run `make setup`"
        command = [program, "-format-error", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    ca = ("-cacert", str(secured.ca.certificate))
    token = ("-H", f"authorization: Bearer {secured.tokens['user']}")
    method = "loaderd.v1.ModelService/ListModels"
    assert "ModelService" in grpcurl(*ca, *token, secured.address, "list").stdout
    listed = grpcurl(*ca, *token, secured.address, method)
    assert (listed.returncode, json.loads(listed.stdout)) == (0, {})
    unload = grpcurl(*ca, *token, secured.address, "loaderd.v1.ModelService/UnloadModel")
    assert json.loads(unload.stderr)["code"] == 7
    assert grpcurl(*ca, secured.address, method).returncode != 0
    assert grpcurl("-plaintext", *token, secured.address, method).returncode != 0


def test_new_clients_and_a_new_certificate_need_no_restart(
    secured: Secured, tmp_path: Path
) -> None:
    new = create_token(secured.clients, "new", "monitor", None)
    other = Authority(tmp_path, "other")
    with Client(secured.address, token=new, tls=secured.tls) as client:
        assert client.models() == []
        other.sign("second", HERE).install(secured.folder, "server")
        assert client.models() == []  # connections that are there go on
    with Client(secured.address, token=new, tls=Tls(ca=other.certificate)) as client:
        assert client.models() == []
