"""The one seam that every call of the blocking client passes: deadlines in, typed errors out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, cast

import grpc
from google.protobuf.message import Message
from grpc.experimental import ChannelOptions
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loaderd.client.channel import CHANNEL_OPTIONS, call_context, check_timeout
from loaderd.client.connection import Connection
from loaderd.client.errors import UnexpectedAnswerError
from loaderd.client.status import CallContext, error_from_rpc
from loaderd.v1 import (
    cache_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2_grpc,
    system_pb2_grpc,
)

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response")
Response_co = TypeVar("Response_co", covariant=True)


class HealthStub(Protocol):
    """The stub of grpc.health.v1, whose published types leave its methods out."""

    Check: grpc.UnaryUnaryMultiCallable[
        health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
    ]
    Watch: grpc.UnaryStreamMultiCallable[
        health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
    ]


_GENERATE = "/loaderd.v1.GenerationService/Generate"

_OPTIONS = [
    *CHANNEL_OPTIONS,
    # Without a thread for each stream, which is faster, and bears a KeyboardInterrupt: with
    # threads, one at the wrong moment lets close() wait forever.
    (ChannelOptions.SingleThreadedUnaryStream, 1),
]


@dataclass(frozen=True)
class Stubs:
    """The generated stubs, for calls that the client does not wrap. They raise grpc's errors."""

    models: model_pb2_grpc.ModelServiceStub
    cache: cache_pb2_grpc.CacheServiceStub
    generation: generation_pb2_grpc.GenerationServiceStub
    system: system_pb2_grpc.SystemServiceStub
    health: HealthStub

    @staticmethod
    def of(channel: grpc.Channel) -> Stubs:
        """The stubs of a channel."""
        return Stubs(
            models=model_pb2_grpc.ModelServiceStub(channel),
            cache=cache_pb2_grpc.CacheServiceStub(channel),
            generation=generation_pb2_grpc.GenerationServiceStub(channel),
            system=system_pb2_grpc.SystemServiceStub(channel),
            health=cast("HealthStub", health_pb2_grpc.HealthStub(channel)),
        )


def _open(connection: Connection) -> grpc.Channel:
    if connection.credentials is None:
        return grpc.insecure_channel(connection.address, options=_OPTIONS)
    return grpc.secure_channel(connection.address, connection.credentials, options=_OPTIONS)


class Transport:
    """A channel to one daemon."""

    def __init__(self, connection: Connection, timeout: float | None) -> None:
        self.connection = connection
        self._timeout = check_timeout(timeout)
        self._channel = _open(connection)
        self._closed = False
        authorized = connection.authorized(self._channel)
        self.stubs = Stubs.of(authorized)
        # As a stream of one message, which is the same on the wire: gRPC goes on with a unary call
        # whose caller was interrupted.
        self._generate = authorized.unary_stream(
            _GENERATE,
            request_serializer=generation_pb2.GenerateRequest.SerializeToString,
            response_deserializer=generation_pb2.GenerateResponse.FromString,
        )

    def call(
        self,
        method: grpc.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        timeout: float | None,
        *,
        grace_s: float = 0.0,
    ) -> Response:
        """Makes a call and waits for its answer.

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
            return method(request, timeout=seconds, metadata=call.metadata)
        except grpc.RpcError as failure:
            raise error_from_rpc(failure, call) from failure

    def generate(
        self, request: generation_pb2.GenerateRequest, timeout: float | None
    ) -> generation_pb2.GenerateResponse:
        """Makes the one long call that does not stream. Being interrupted cancels it.

        Args:
            request: What to send.
            timeout: Seconds; None: it has no deadline.
        """
        answers = list(self.stream(self._generate, request, timeout))
        if len(answers) != 1:
            raise UnexpectedAnswerError(f"{len(answers)} answers came to a call that has one")
        return answers[0]

    def stream(
        self,
        method: grpc.UnaryStreamMultiCallable[Request, Response],
        request: Request,
        timeout: float | None,
    ) -> ResponseStream[Response]:
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
        return ResponseStream(call, context)

    def close(self) -> None:
        """Closes the channel; calls under way end with `CallCancelledError`."""
        self._closed = True
        self._channel.close()

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("this client is closed")


class _StreamingCall(Protocol[Response_co]):
    def __next__(self) -> Response_co: ...
    def cancel(self) -> bool: ...


class ResponseStream(Generic[Response]):
    """The messages of one streaming call, which is cancelled when nobody holds this any more.

    gRPC may keep a call alive whose iterator was dropped, and then the daemon goes on with it.
    """

    def __init__(self, call: _StreamingCall[Response], context: CallContext) -> None:
        self._call = call
        self._context = context
        self._answered = False

    def __iter__(self) -> Iterator[Response]:
        return self

    def __next__(self) -> Response:
        try:
            message = next(self._call)
        except StopIteration:
            raise
        except grpc.RpcError as failure:
            raise error_from_rpc(failure, self._context, answered=self._answered) from failure
        except BaseException:
            self.cancel()
            raise
        self._answered = True
        return message

    def cancel(self) -> None:
        """Cancels the call; nothing happens when it has ended."""
        self._call.cancel()

    def __del__(self) -> None:
        self.cancel()
