"""Backends of the contract suite. To add one: a parameter here that yields its `Backend`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

import pytest

from loaderd.client import AsyncClient, AsyncModel, Client
from loaderd.client.errors import ModelNotLoadedError
from tests.contract.backend import Backend
from tests.contract.blocking import as_async
from tests.fake_daemon import FakeDaemon


@pytest.fixture
def fake_backend() -> Iterator[Backend]:
    with FakeDaemon() as daemon:
        yield Backend(
            address=daemon.address,
            model="demo/chat",
            missing="missing/model",
            missing_revision="demo/chat@missing",
            uncached="demo/remote",
            long={"max_new_tokens": 50_000, "ignore_eos": True},
        )


@pytest.fixture(params=["fake"])
def backend(request: pytest.FixtureRequest) -> Backend:
    backend: Backend = request.getfixturevalue(f"{request.param}_backend")
    return backend


@pytest.fixture(params=["sync", "async"])
async def client(request: pytest.FixtureRequest, backend: Backend) -> AsyncIterator[AsyncClient]:
    """A client of either kind; when it is done, nothing is loaded."""
    blocking = request.param == "sync"
    client = as_async(Client(backend.address)) if blocking else AsyncClient(backend.address)
    async with client:
        yield client
    with Client(backend.address) as cleaner:
        for model in cleaner.models():
            with suppress(ModelNotLoadedError):  # it may be on its way out
                model.unload(force=True)


@pytest.fixture
async def model(client: AsyncClient, backend: Backend) -> AsyncModel:
    return await client.load(backend.model)
