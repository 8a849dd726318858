"""The handle of a lease."""
# ruff: noqa: ASYNC109 - `timeout` is the call's deadline, which travels to the daemon

from __future__ import annotations

from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

from loaderd.client import responses
from loaderd.client.aio.transport import AsyncTransport
from loaderd.client.errors import LeaseNotFoundError
from loaderd.client.types import LeaseInfo
from loaderd.v1 import model_pb2

if TYPE_CHECKING:
    from loaderd.client.aio.model import AsyncModel


class AsyncLease:
    """A hold on a model: while it lives, the model is not unloaded for being idle or for another.

    Made by `AsyncClient.lease` and `AsyncModel.lease`. Leaving its `async with` block
    releases it; else it ends by itself. What its `model` generates renews it.
    """

    def __init__(self, transport: AsyncTransport, info: LeaseInfo, model: AsyncModel) -> None:
        self._transport = transport
        self._info = info
        self._model = model

    @property
    def id(self) -> str:
        """What requests name it by."""
        return self._info.id

    @property
    def info(self) -> LeaseInfo:
        """What the daemon last told this handle of the lease."""
        return self._info

    @property
    def model(self) -> AsyncModel:
        """The model that it holds, as a handle whose requests for text name the lease."""
        return self._model

    async def renew(self, *, timeout: float | None = None) -> LeaseInfo:
        """Starts its time anew; updates and returns `info`.

        Raises:
            LeaseNotFoundError: It has ended.
        """
        request = model_pb2.RenewLeaseRequest(lease_id=self.id)
        response = await self._transport.call(
            self._transport.stubs.models.RenewLease, request, timeout
        )
        self._info = responses.lease(response.lease)
        return self._info

    async def release(self, *, timeout: float | None = None) -> None:
        """Ends it.

        Raises:
            LeaseNotFoundError: It has ended already.
        """
        request = model_pb2.ReleaseLeaseRequest(lease_id=self.id)
        await self._transport.call(self._transport.stubs.models.ReleaseLease, request, timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(LeaseNotFoundError):  # then it has ended already
            await self.release()
