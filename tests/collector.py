"""A collector of OpenTelemetry's in this process, which keeps the spans that it gets."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector:
    """Takes OTLP over gRPC on a free port of 127.0.0.1 while its context is entered.

    Attributes:
        url: Where it listens.
        services: The names of the services that spans came from.
        headers: What the last export carried.
    """

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._lock = threading.Lock()
        self.services: set[str] = set()
        self.headers: dict[str, str] = {}
        self._server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
        servicer: Any = self
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(  # type: ignore[no-untyped-call]
            servicer, self._server
        )
        self.url = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Collector:
        self._server.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.stop(grace=0).wait(10)

    def Export(  # noqa: N802 - the protocol's name
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        metadata: Any = context.invocation_metadata()
        with self._lock:
            self.headers = dict(metadata)
            for group in request.resource_spans:
                attributes = {each.key: each.value for each in group.resource.attributes}
                self.services.add(attributes["service.name"].string_value)
                for scope in group.scope_spans:
                    self._spans.extend(scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    @property
    def spans(self) -> list[Span]:
        """All that came, by their begins."""
        with self._lock:
            return sorted(self._spans, key=lambda span: span.start_time_unix_nano)

    def one(self, name: str) -> Span:
        """The only span of a name, which may be the last part of it."""
        (found,) = (span for span in self.spans if span.name.rpartition("/")[2] == name)
        return found

    def tree(self, span: Span) -> dict[str, Any]:
        """The names of a span's parts, each with its own."""
        children = [each for each in self.spans if each.parent_span_id == span.span_id]
        return {child.name: self.tree(child) for child in children}


def told(span: Span) -> dict[str, Any]:
    """The attributes of a span that are texts or whole numbers."""
    return {each.key: each.value.string_value or each.value.int_value for each in span.attributes}
