"""Backends of the contract suite. To add one: a parameter here that yields its `Backend`."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from loaderd.client import AsyncClient, AsyncModel, Client, LoadOptions, ModelState
from loaderd.client.errors import ModelNotLoadedError
from tests.contract.backend import Backend
from tests.contract.blocking import as_async
from tests.daemon import SpawnedDaemon
from tests.fake_daemon import FakeDaemon
from tests.hub import Hub, HubRepo
from tests.hub.faults import hang

CHAT = "org/chat"
NO_THINKING = (
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "{{ '<think></think>' }}{% endif %}"
)
"""What makes a chat template read a variable, as those of thinking models do."""


@pytest.fixture
def fake_backend() -> Iterator[Backend]:
    with FakeDaemon() as daemon:
        yield Backend(
            address=daemon.address,
            model="demo/chat",
            missing="missing/model",
            missing_revision="demo/chat@missing",
            uncached="demo/remote",
            stalled="demo/stalled",
            long={"max_new_tokens": 50_000, "ignore_eos": True},
        )


@pytest.fixture(scope="session")
def real_daemon(
    tmp_path_factory: pytest.TempPathFactory, real_model: Path, tiny_model: Path
) -> Iterator[SpawnedDaemon]:
    """A spawned daemon and the hub that it downloads from, with the chat model in its cache."""
    chat = HubRepo.from_folder(CHAT, real_model)
    template = (real_model / "chat_template.jinja").read_text()
    chat.commit({"chat_template.jinja": (template + NO_THINKING).encode()})
    others = [HubRepo.from_folder(name, tiny_model) for name in ("org/remote", "org/stalled")]
    with (
        Hub(chat, *others) as hub,
        SpawnedDaemon(
            tmp_path_factory.mktemp("contract"), ["--standby", "2"], {"HF_ENDPOINT": hub.url}
        ) as daemon,
    ):
        hub.inject(hang(after_bytes=1000), path="/org/stalled/resolve/*/model.safetensors")
        with Client(daemon.address) as client:
            client.cache.download(chat.id)
        yield daemon


@pytest.fixture
def real_backend(real_daemon: SpawnedDaemon, request: pytest.FixtureRequest) -> Backend:
    shares = "model" in request.fixturenames or not _is_about_loading(request)
    _unload_all(real_daemon.address, but=CHAT if shares else None)
    for name in ("remote", "stalled"):
        shutil.rmtree(real_daemon.cache_dir / f"models--org--{name}", ignore_errors=True)
    return Backend(
        address=real_daemon.address,
        model=CHAT,
        missing="org/missing",
        missing_revision="org/chat@missing",
        uncached="org/remote",
        stalled="org/stalled",
        long={"max_new_tokens": 4000, "ignore_eos": True},
    )


# Real loads take a while: the asynchronous client makes them all, and the blocking one, which
# shares all but the transport with it, those of the fake and of tests/integration.
@pytest.fixture(params=["fake-sync", "fake-async", "real-async"])
def kind(request: pytest.FixtureRequest) -> tuple[str, str]:
    """The backend's name and the client's."""
    daemon, _, client = str(request.param).partition("-")
    return daemon, client


@pytest.fixture
def backend(request: pytest.FixtureRequest, kind: tuple[str, str]) -> Backend:
    backend: Backend = request.getfixturevalue(f"{kind[0]}_backend")
    return backend


@pytest.fixture
async def client(kind: tuple[str, str], backend: Backend) -> AsyncIterator[AsyncClient]:
    """A client of either kind.

    Real loads take a while, so that tests share one: before a test that takes `model`, or is not
    about loading, this model may be loaded; before the others nothing is.
    """
    blocking = kind[1] == "sync"
    client = as_async(Client(backend.address)) if blocking else AsyncClient(backend.address)
    async with client:
        yield client


def _is_about_loading(request: pytest.FixtureRequest) -> bool:
    return not {"load", "watch", "cache"}.isdisjoint(request.module.__name__.split("_"))


def _unload_all(address: str, *, but: str | None) -> None:
    """Unloads what tests before have left, but for the model of a name as `model` makes it."""
    plain = LoadOptions(dtype=None, device_map=None, quantization=None, max_memory={}, offload=None)
    with Client(address) as client:
        for model in client.models():
            stays = model.name == but and model.info.options == plain
            if not stays or model.state is not ModelState.READY or model.info.active_leases:
                with suppress(ModelNotLoadedError):  # it may be on its way out
                    model.unload(force=True)


@pytest.fixture
async def model(client: AsyncClient, backend: Backend) -> AsyncModel:
    return await client.load(backend.model)
