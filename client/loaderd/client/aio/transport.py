"""The one seam that every call of the asyncio client passes: deadlines in, typed errors out."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, cast

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loaderd.client.channel import CHANNEL_OPTIONS, call_context, check_timeout
from loaderd.client.connection import Connection
from loaderd.client.errors import CallCancelledError
from loaderd.client.status import CallContext, error_from_rpc
from loaderd.v1 import (
    cache_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2_grpc,
    system_pb2_grpc,
)

if TYPE_CHECKING:  # these names exist for type checkers only
    from loaderd.v1.cache_pb2_grpc import CacheServiceAsyncStub
    from loaderd.v1.generation_pb2_grpc import GenerationServiceAsyncStub
    from loaderd.v1.model_pb2_grpc import ModelServiceAsyncStub
    from loaderd.v1.system_pb2_grpc import SystemServiceAsyncStub

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response")


class AsyncHealthStub(Protocol):
    """The stub of grpc.health.v1, whose published types leave its methods out."""

    Check: grpc.aio.UnaryUnaryMultiCallable[
        health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
    ]
    Watch: grpc.aio.UnaryStreamMultiCallable[
        health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
    ]


@dataclass(frozen=True)
class AsyncStubs:
    """The generated stubs, for calls that the client does not wrap. They raise grpc's errors."""

    models: ModelServiceAsyncStub
    cache: CacheServiceAsyncStub
    generation: GenerationServiceAsyncStub
    system: SystemServiceAsyncStub
    health: AsyncHealthStub

    @staticmethod
    def of(channel: grpc.aio.Channel) -> AsyncStubs:
        """The stubs of a channel."""
        return AsyncStubs(
            models=model_pb2_grpc.ModelServiceStub(channel),
            cache=cache_pb2_grpc.CacheServiceStub(channel),
            generation=generation_pb2_grpc.GenerationServiceStub(channel),
            system=system_pb2_grpc.SystemServiceStub(channel),
            health=cast("AsyncHealthStub", health_pb2_grpc.HealthStub(channel)),
        )


class AsyncTransport:
    """A channel to one daemon. It belongs to the event loop that first uses it."""

    def __init__(self, connection: Connection, timeout: float | None) -> None:
        self.connection = connection
        self._timeout = check_timeout(timeout)
        self._closed = False

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        # Not before a loop runs: gRPC binds a channel to the loop that it is made in.
        address, credentials = self.connection.address, self.connection.credentials
        if credentials is None:
            return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)

    @cached_property
    def stubs(self) -> AsyncStubs:
        """The stubs of the channel."""
        return AsyncStubs.of(self.connection.authorized(self._channel))

    async def call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        timeout: float | None,  # noqa: ASYNC109 - the call's deadline, which travels
        *,
        grace_s: float = 0.0,
    ) -> Response:
        """Makes a call and waits for its answer. Cancelling the task cancels it.

        Args:
            method: Of `stubs`.
            request: What to send.
            timeout: Seconds; None: the client's default, and `grace_s` more.
            grace_s: How long the daemon was asked to wait.
        """
        self._require_open()
        seconds = check_timeout(timeout)
        if timeout is None and self._timeout is not None:
            seconds = self._timeout + grace_s
        call = call_context(self.connection, request, seconds)
        try:
            return await method(request, timeout=seconds, metadata=call.metadata)
        except grpc.RpcError as failure:
            raise error_from_rpc(failure, call) from failure
        except asyncio.CancelledError:
            if _task_is_cancelled():
                raise
            raise CallCancelledError("the client was closed during the call") from None

    async def generate(
        self,
        request: generation_pb2.GenerateRequest,
        timeout: float | None,  # noqa: ASYNC109 - as above
    ) -> generation_pb2.GenerateResponse:
        """Makes the one long call that does not stream.

        Args:
            request: What to send.
            timeout: Seconds; None: it has no deadline.
        """
        unlimited = math.inf if timeout is None else timeout
        return await self.call(self.stubs.generation.Generate, request, unlimited)

    def stream(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[Request, Response],
        request: Request,
        timeout: float | None,
    ) -> AsyncResponseStream[Response]:
        """Starts a streaming call.

        Args:
            method: Of `stubs`.
            request: What to send.
            timeout: Seconds until it must have ended; None: it has no deadline.
        """
        self._require_open()
        seconds = check_timeout(timeout)
        context = call_context(self.connection, request, seconds)
        call = method(request, timeout=seconds, metadata=context.metadata)
        return AsyncResponseStream(call, context)

    async def close(self) -> None:
        """Closes the channel; calls under way end with `CallCancelledError`."""
        self._closed = True
        if "_channel" in self.__dict__:
            await self._channel.close()

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("this client is closed")


def _task_is_cancelled() -> bool:
    """Whether a CancelledError is this task's own, rather than that of a gRPC call."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class AsyncResponseStream(Generic[Response]):
    """The messages of one streaming call, which is cancelled when nobody holds this any more.

    gRPC may keep a call alive whose iterator was dropped, and then the daemon goes on with it.
    """

    def __init__(
        self, call: grpc.aio.UnaryStreamCall[Request, Response], context: CallContext
    ) -> None:
        self._call = call
        self._messages = aiter(call)
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._error: Exception | None = None
        self._answered = False

    def __aiter__(self) -> AsyncIterator[Response]:
        return self

    async def __anext__(self) -> Response:
        if self._error is not None:  # gRPC tells it once, and then a plain end
            raise self._error
        try:
            message = await anext(self._messages)
        except grpc.RpcError as failure:
            self._error = error_from_rpc(failure, self._context, answered=self._answered)
            raise self._error from failure
        except asyncio.CancelledError:
            self._error = CallCancelledError("the call was cancelled")
            if _task_is_cancelled():
                raise
            raise self._error from None
        self._answered = True
        return message

    def cancel(self) -> None:
        """Cancels the call; nothing happens when it has ended."""
        self._call.cancel()

    def __del__(self) -> None:
        # The last reference may go in another thread, or after the loop.
        if not self._loop.is_closed() and not self._call.done():
            self._loop.call_soon_threadsafe(self._call.cancel)
