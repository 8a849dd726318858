"""Tells an observer how every call ended."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc

from loaderd.server.rpc.observer import Observer

Context = grpc.aio.ServicerContext[Any, Any]
Q = TypeVar("Q")
R = TypeVar("R")


class CallCounter(grpc.aio.ServerInterceptor):
    """The outermost interceptor: sees the status that the others made of a call's end.

    Args:
        observer: Is told.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Q, R] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Q, R] | None:
        """Wraps the call's handler; a method that there is not is not counted."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        method = str(handler_call_details.method).removeprefix("/")
        codec = handler.request_deserializer, handler.response_serializer
        if handler.request_streaming:
            streaming = self._streaming(handler.stream_stream, method)
            return grpc.stream_stream_rpc_method_handler(streaming, *codec)
        if handler.response_streaming:
            streaming = self._streaming(handler.unary_stream, method)
            return grpc.unary_stream_rpc_method_handler(streaming, *codec)
        return grpc.unary_unary_rpc_method_handler(self._unary(handler.unary_unary, method), *codec)

    def _unary(self, handler: Any, method: str) -> Any:
        async def call(request: Any, context: Context) -> Any:
            with self._counted(method, context):
                return await handler(request, context)

        return call

    def _streaming(self, handler: Any, method: str) -> Any:
        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            with self._counted(method, context):
                if not inspect.isasyncgenfunction(handler):
                    await handler(request, context)
                    return
                responses = handler(request, context)
                try:
                    async for response in responses:
                        yield response
                finally:
                    await responses.aclose()

        return call

    @contextmanager
    def _counted(self, method: str, context: Context) -> Iterator[None]:
        code = "OK"
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            code = "CANCELLED"
            raise
        except grpc.aio.AbortError:
            code = _code_of(context)
            raise
        except BaseException:
            code = "UNKNOWN"  # what gRPC makes of it
            raise
        finally:
            self._observer.called(method, code)


def _code_of(context: Context) -> str:
    """The code that the call was aborted with: gRPC keeps it as a number or as what was given."""
    given: Any = context.code()
    by_number = {code.value[0]: code for code in grpc.StatusCode}
    code = given if isinstance(given, grpc.StatusCode) else by_number[int(given)]
    return code.name
