"""What every call passes: it is admitted, and its failure becomes a status."""

from __future__ import annotations

import asyncio
import inspect
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from loaderd.server.errors import InternalError, LoaderdError
from loaderd.server.rpc.admission import Admission, Malformed
from loaderd.server.rpc.call import REQUEST_ID_HEADER, Call, code_name
from loaderd.server.rpc.status import status_of
from loaderd.server.tracing import names
from loaderd.server.tracing.spans import Span, Tracer

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Q = TypeVar("Q")
R = TypeVar("R")


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Admits every call, and ends it in a status of ours, whatever its handler raises.

    Domain errors become their status. Anything else is a defect: the log gets the cause, the client
    INTERNAL with an incident number. Malformed requests, which gRPC would answer with UNKNOWN and
    the exception's text, become INVALID_ARGUMENT, and so do those that are out of bounds.

    Args:
        admission: Lets calls in.
        tracer: Gets a span of each call of loaderd's own services; None: nobody asked.
    """

    def __init__(self, admission: Admission, tracer: Tracer | None = None) -> None:
        self._admission = admission
        self._tracer = tracer

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Q, R] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Q, R] | None:
        """Wraps the call's handler."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None  # UNIMPLEMENTED
        method = str(handler_call_details.method)
        decode = _tolerant(handler.request_deserializer)
        encode = handler.response_serializer
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._streaming(handler.stream_stream, method), decode, encode
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._streaming(handler.unary_stream, method), decode, encode
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(handler.unary_unary, method), decode, encode
        )

    def _unary(self, handler: Any, method: str) -> Any:
        async def call(request: Any, context: Context) -> Any:
            async with self._serving(method, request, context, streams=False) as admitted:
                return await handler(admitted, context)

        return call

    def _streaming(self, handler: Any, method: str) -> Any:
        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            async with self._serving(method, request, context, streams=True) as admitted:
                if not inspect.isasyncgenfunction(handler):  # writes through the context
                    await handler(admitted, context)
                    return
                responses = handler(admitted, context)
                try:
                    async for response in responses:
                        yield response
                finally:
                    await responses.aclose()

        return call

    @asynccontextmanager
    async def _serving(
        self, method: str, request: object, context: Context, *, streams: bool
    ) -> AsyncIterator[Any]:
        """Admits a call, ends it in a status, and tells the logs before its caller hears of it."""
        call = self._admission.call(method, request, context, self._span(method, context))
        try:
            with self._admission.admit(call, streams=streams) as admitted:
                context.set_trailing_metadata(((REQUEST_ID_HEADER, call.request_id),))
                yield admitted
        except grpc.aio.AbortError:
            number: Any = context.code()  # grpc's type stubs hide that it is one
            call.tell(code_name(number))
            raise
        except LoaderdError as error:
            await _abort(call, error, context)
        except (asyncio.CancelledError, GeneratorExit) as error:
            task = asyncio.current_task()
            if isinstance(error, GeneratorExit) or (task is not None and task.cancelling()):
                call.tell("CANCELLED")
                raise  # the client left, or the server stops: gRPC knows
            # Raised by the handler itself: without a status the client would wait for its deadline.
            await _abort_as_defect(call, context)
        except Exception:
            await _abort_as_defect(call, context)
        else:
            call.tell("OK")

    def _span(self, method: str, context: Context) -> Span | None:
        if self._tracer is None or not method.startswith("/loaderd."):
            return None  # probes and reflection say nothing of what the daemon does
        name = method.removeprefix("/")
        span = self._tracer.serve(name, context.invocation_metadata() or ())
        span.set({names.RPC_SYSTEM: "grpc", names.RPC_METHOD: name})
        return span


async def _abort(call: Call, error: LoaderdError, context: Context) -> None:
    status = status_of(error, call.request_id)
    call.tell(code_name(status.code), error.reason)
    aborted = rpc_status.to_status(status)
    named = (*aborted.trailing_metadata, (REQUEST_ID_HEADER, call.request_id))
    await context.abort(aborted.code, aborted.details, named)


async def _abort_as_defect(call: Call, context: Context) -> None:
    error = InternalError(incident=secrets.token_hex(4))
    logger.exception("incident %s", error.incident)
    await _abort(call, error, context)


def _tolerant(decode: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if decode is None:
        return None

    def decode_or_mark(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError:
            return Malformed()

    return decode_or_mark
