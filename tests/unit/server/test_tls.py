"""TLS of the daemon: who is let in, by which name, and files that are replaced meanwhile."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from loaderd import client
from loaderd.server.access.clients import ClientsFile
from loaderd.server.access.quotas import Quotas
from loaderd.server.config import ConfigError
from loaderd.server.rpc.access import Access, current_caller
from loaderd.server.rpc.admission import Admission
from loaderd.server.rpc.clients import Clients
from loaderd.server.rpc.interceptor import CallInterceptor
from loaderd.server.rpc.tls import ServerTls
from loaderd.v1 import model_pb2, model_pb2_grpc
from tests.certificates import HERE, Authority, Certificate, encrypt

UNREACHABLE = "UNAVAILABLE"
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


class WhoAmI(model_pb2_grpc.ModelServiceServicer):
    """Answers with a model whose name is the caller's, and whose id is its role."""

    async def GetModel(  # noqa: N802
        self, request: model_pb2.GetModelRequest, context: Any
    ) -> model_pb2.GetModelResponse:
        caller = current_caller()
        return model_pb2.GetModelResponse(model=model_pb2.Model(name=caller.name, id=caller.role))


@dataclass
class Tls:
    """Two authorities, and the files that the server looks at."""

    folder: Path
    ours: Authority
    theirs: Authority
    server: Certificate


@pytest.fixture
def tls(tmp_path: Path) -> Tls:
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    server = ours.sign("first", HERE).install(tmp_path, "server")
    return Tls(tmp_path, ours, theirs, server)


@asynccontextmanager
async def serving(
    tls: Tls, client_ca: Path | None = None, clients: Path | None = None, ports: int = 1
) -> AsyncIterator[list[str]]:
    file = None if clients is None else ClientsFile(clients)
    interceptor = CallInterceptor(Admission(Access(file, Quotas(time.monotonic)), Clients()))
    server = grpc.aio.server(interceptors=[interceptor])
    model_pb2_grpc.add_ModelServiceServicer_to_server(
        WhoAmI(),  # type: ignore[abstract]  # the other methods are not called
        server,
    )
    settings = ServerTls(tls.server.certificate, tls.server.key, client_ca)
    addresses = [
        f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', settings.credentials())}"
        for _ in range(ports)
    ]
    await server.start()
    yield addresses
    await server.stop(0)


async def ask(
    address: str, ca: Authority | None, own: Certificate | None = None
) -> tuple[str, str] | str:
    """Who the server says that calls, and its role; or the reason or code of the failure."""
    if ca is None:
        channel = grpc.aio.insecure_channel(address, options=OWN_CONNECTION)
    else:
        credentials = grpc.ssl_channel_credentials(
            ca.certificate.read_bytes(),
            own.key.read_bytes() if own else None,
            own.certificate.read_bytes() if own else None,
        )
        channel = grpc.aio.secure_channel(address, credentials, options=OWN_CONNECTION)
    async with channel:
        stub: Any = model_pb2_grpc.ModelServiceStub(channel)
        try:
            model = (await stub.GetModel(model_pb2.GetModelRequest(), timeout=30)).model
        except grpc.aio.AioRpcError as error:
            status = rpc_status.from_call(error)  # type: ignore[arg-type]
            if status is None:
                return error.code().name
            info = error_details_pb2.ErrorInfo()
            status.details[0].Unpack(info)
            return str(info.reason)
        return model.name, model.id


async def test_only_tls_gets_in_and_only_who_trusts_the_certificate(tls: Tls) -> None:
    async with serving(tls) as (address,):
        assert await ask(address, tls.ours) == ("", "admin")
        assert await ask(address, None) == UNREACHABLE
        assert await ask(address, tls.theirs) == UNREACHABLE


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
async def test_old_versions_of_tls_are_refused(tls: Tls) -> None:
    async with serving(tls) as (address,):
        assert await greet(address, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await greet(address, ssl.TLSVersion.TLSv1_1)


async def greet(address: str, newest: ssl.TLSVersion) -> str | None:
    """The version that a client agrees on that knows no newer one than `newest`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")  # or this side would refuse it by itself
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, newest
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    version: str | None = writer.get_extra_info("ssl_object").version()
    writer.close()
    return version


async def test_a_new_certificate_is_used_at_every_address_without_a_restart(tls: Tls) -> None:
    async with serving(tls, ports=2) as addresses:
        for address in addresses:
            assert await ask(address, tls.ours) == ("", "admin")
        tls.theirs.sign("second", HERE).install(tls.folder, "server")
        for address in addresses:
            assert await ask(address, tls.ours) == UNREACHABLE
            assert await ask(address, tls.theirs) == ("", "admin")


async def test_half_of_a_new_pair_changes_nothing_until_the_other_half_comes(
    tls: Tls, caplog: pytest.LogCaptureFixture
) -> None:
    second = tls.theirs.sign("second", HERE)
    async with serving(tls) as (address,):
        tls.server.key.write_bytes(second.key.read_bytes())
        for _ in range(3):
            assert await ask(address, tls.ours) == ("", "admin")
        assert caplog.text.count("TLS stays as it is") == 1
        assert "PRIVATE KEY" not in caplog.text
        tls.server.certificate.unlink()
        assert await ask(address, tls.ours) == ("", "admin")
        tls.server.certificate.write_bytes(second.certificate.read_bytes())
        assert await ask(address, tls.theirs) == ("", "admin")


async def test_a_client_without_a_certificate_of_the_ca_does_not_get_in(tls: Tls) -> None:
    mine, other = tls.ours.sign("mine", "DNS:mine"), tls.theirs.sign("other", "DNS:other")
    async with serving(tls, client_ca=tls.ours.certificate) as (address,):
        assert await ask(address, tls.ours) == UNREACHABLE
        assert await ask(address, tls.ours, other) == UNREACHABLE
        assert await ask(address, tls.ours, mine) == ("mine", "admin")


async def test_another_ca_of_clients_is_used_without_a_restart(tls: Tls) -> None:
    mine, other = tls.ours.sign("mine", "DNS:mine"), tls.theirs.sign("other", "DNS:other")
    client_ca = tls.ours.install(tls.folder, "clients").certificate
    async with serving(tls, client_ca=client_ca) as (address,):
        assert await ask(address, tls.ours, mine) == ("mine", "admin")
        tls.theirs.install(tls.folder, "clients")
        assert await ask(address, tls.ours, mine) == UNREACHABLE
        assert await ask(address, tls.ours, other) == ("other", "admin")


async def test_the_file_of_clients_gives_certificates_their_names_and_roles(tls: Tls) -> None:
    clients = tls.folder / "clients.toml"
    clients.write_text(
        '[[clients]]\nname = "ci"\nrole = "user"\ncertificate = "ci.example.com"\n'
        '[[clients]]\nname = "watch"\nrole = "admin"\ncertificate = "spiffe://example/watch"\n'
        '[[clients]]\nname = "plain"\nrole = "user"\ncertificate = "plain"\n'
        '[[clients]]\nname = "old"\nrole = "user"\ncertificate = "old"\n'
        "expires = 2020-01-01T00:00:00Z\n"
    )
    expected = {
        "DNS:ci.example.com": ("ci", "user"),
        "URI:spiffe://example/watch,DNS:other": ("watch", "admin"),
        "DNS:stranger": "UNAUTHENTICATED",
        "DNS:old": "UNAUTHENTICATED",
    }
    async with serving(tls, tls.ours.certificate, clients) as (address,):
        for number, (names, outcome) in enumerate(expected.items()):
            certificate = tls.ours.sign(f"client-{number}", names)
            assert await ask(address, tls.ours, certificate) == outcome
        assert await ask(address, tls.ours, tls.ours.sign("plain", None)) == ("plain", "user")
        # A common name counts only where there are no alternative names.
        assert await ask(address, tls.ours, tls.ours.sign("plain", "DNS:x")) == "UNAUTHENTICATED"


async def test_the_sdk_shows_a_certificate_of_its_own(tls: Tls) -> None:
    mine = tls.ours.sign("mine", "DNS:mine")
    async with serving(tls, client_ca=tls.ours.certificate) as (address,):
        own = client.Tls(tls.ours.certificate, mine.certificate, mine.key)
        async with client.AsyncClient(address, tls=own) as sdk:
            answer = await sdk.raw.models.GetModel(model_pb2.GetModelRequest(), timeout=30)
            assert answer.model.name == "mine"
        async with client.AsyncClient(address, tls=client.Tls(tls.ours.certificate)) as sdk:
            with pytest.raises(client.errors.DaemonUnreachableError, match="wants a certificate"):
                await sdk.models()


def test_files_that_cannot_be_used_are_named_at_the_start(tls: Tls) -> None:
    server, other = tls.server, tls.theirs.sign("other", HERE)
    missing, text = tls.folder / "missing.pem", tls.folder / "text.pem"
    text.write_text("no certificate")
    encrypted = tls.folder / "encrypted.key"
    encrypt(tls.server.key, encrypted)
    for certificate, key, client_ca in (
        (missing, server.key, None),
        (server.certificate, missing, None),
        (server.certificate, other.key, None),
        (text, server.key, None),
        (server.certificate, encrypted, None),
        (server.certificate, server.key, missing),
        (server.certificate, server.key, text),
    ):
        with pytest.raises(ConfigError, match=r"tls_cert, tls_key: .*\.(pem|key)"):
            ServerTls(certificate, key, client_ca).credentials()
