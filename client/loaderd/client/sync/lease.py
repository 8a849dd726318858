"""The handle of a lease."""

from __future__ import annotations

from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

from loaderd.client import responses
from loaderd.client.errors import LeaseNotFoundError
from loaderd.client.sync.transport import Transport
from loaderd.client.types import LeaseInfo
from loaderd.v1 import model_pb2

if TYPE_CHECKING:
    from loaderd.client.sync.model import Model


class Lease:
    """A hold on a model: while it lives, the model is not unloaded for being idle or for another.

    Made by `Client.lease` and `Model.lease`. Leaving its `with` block releases it; else it
    ends by itself. What its `model` generates renews it.
    """

    def __init__(self, transport: Transport, info: LeaseInfo, model: Model) -> None:
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
    def model(self) -> Model:
        """The model that it holds, as a handle whose requests for text name the lease."""
        return self._model

    def renew(self, *, timeout: float | None = None) -> LeaseInfo:
        """Starts its time anew; updates and returns `info`.

        Raises:
            LeaseNotFoundError: It has ended.
        """
        request = model_pb2.RenewLeaseRequest(lease_id=self.id)
        response = self._transport.call(self._transport.stubs.models.RenewLease, request, timeout)
        self._info = responses.lease(response.lease)
        return self._info

    def release(self, *, timeout: float | None = None) -> None:
        """Ends it.

        Raises:
            LeaseNotFoundError: It has ended already.
        """
        request = model_pb2.ReleaseLeaseRequest(lease_id=self.id)
        self._transport.call(self._transport.stubs.models.ReleaseLease, request, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(LeaseNotFoundError):  # then it has ended already
            self.release()
