"""Traces by OpenTelemetry's SDK, which only those have who ask for them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.exporter import InvalidCompressionValueException
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import Link, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from loaderd.server.tracing import names
from loaderd.server.tracing.spans import CANCELLED, Span, Value

logger = logging.getLogger(__name__)

_FLUSH_S = 3.0
_LONGEST_VALUE = 256  # a model's name, for one, is what a client sent
_W3C = TraceContextTextMapPropagator()


class SdkTracer:
    """Begins spans of an SDK's provider.

    Args:
        provider: What becomes of spans. It is closed with the tracer.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("loaderd", version("loaderd"))
        # It would quote what a client sent, as often as that comes.
        logging.getLogger("opentelemetry.trace").setLevel(logging.ERROR)

    @classmethod
    def to_collector(
        cls, endpoint: str | None, ratio: float | None, service_name: str | None
    ) -> SdkTracer:
        """Sends spans by OTLP over gRPC, in batches, from a thread of its own.

        What is left open is as the variables OTEL_* say, or the SDK's default.

        Args:
            endpoint: http:// or https://, host and port.
            ratio: Of traces that begin here, how many are kept, from 0 to 1.
            service_name: What the spans say that they are of.

        Raises:
            ValueError: A variable has a value that cannot be used.
        """
        # Of each batch that is lost there is one line, not one for each attempt as well.
        logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)
        try:
            exporter = BatchSpanProcessor(OTLPSpanExporter(endpoint))
        except InvalidCompressionValueException as error:
            raise ValueError(str(error)) from error
        sampler = None if ratio is None else ParentBasedTraceIdRatio(ratio)
        provider = TracerProvider(
            sampler,
            _resource(service_name),
            shutdown_on_exit=False,  # `close` does, with a bound
        )
        provider.add_span_processor(exporter)
        return cls(provider)

    def serve(self, name: str, headers: Iterable[tuple[str, str | bytes]]) -> Span:
        """See `Tracer.serve`."""
        parent = _W3C.extract(_trace_context(headers), Context())
        return _SdkSpan(self._tracer, _Clock(), name, parent, kind=SpanKind.SERVER)

    def begin(self, name: str) -> Span:
        """See `Tracer.begin`."""
        return _SdkSpan(self._tracer, _Clock(), name, Context())

    def close(self) -> None:
        """Sends what waits still, which takes a few seconds at most."""
        flush = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        flush.start()
        flush.join(_FLUSH_S)
        if flush.is_alive():
            logger.warning("the collector did not take the last spans in time")


class _Clock:
    """The time of day for the spans of one trace, which fit together whoever sets it meanwhile."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def ns(self, at: float | None) -> int:
        """Nanoseconds of the epoch at a monotonic time in seconds; None: now."""
        return self._offset_ns + (time.monotonic_ns() if at is None else round(at * 1e9))


class _SdkSpan:
    """A span of the SDK's."""

    def __init__(
        self,
        tracer: trace.Tracer,
        clock: _Clock,
        name: str,
        parent: Context,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        links: Sequence[Link] = (),
        at: float | None = None,
    ) -> None:
        self._tracer = tracer
        self._clock = clock
        self._span = tracer.start_span(name, parent, kind, links=links, start_time=clock.ns(at))
        context = self._span.get_span_context()
        self.ids: Mapping[str, str] = (
            {
                "trace_id": trace.format_trace_id(context.trace_id),
                "span_id": trace.format_span_id(context.span_id),
            }
            if context.is_valid
            else {}
        )

    def child(self, name: str, *, at: float | None = None, link: Span | None = None) -> Span:
        """See `Span.child`."""
        links = [Link(link._span.get_span_context())] if isinstance(link, _SdkSpan) else []
        parent = trace.set_span_in_context(self._span, Context())
        return _SdkSpan(self._tracer, self._clock, name, parent, links=links, at=at)

    def set(self, attributes: Mapping[str, Value]) -> None:
        """See `Span.set`."""
        if self._span.is_recording():
            self._span.set_attributes({key: _short(each) for key, each in attributes.items()})

    def end(self, *, at: float | None = None, error: str = "") -> None:
        """See `Span.end`."""
        if error:
            self._span.set_attribute(names.ERROR_TYPE, error)
        if error and error != CANCELLED:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end(self._clock.ns(at))


def _resource(service_name: str | None) -> Resource:
    found = Resource.create({SERVICE_VERSION: version("loaderd")})
    if service_name is None and str(found.attributes[SERVICE_NAME]).startswith("unknown_service"):
        service_name = "loaderd"  # no variable has one either
    return found if service_name is None else found.merge(Resource({SERVICE_NAME: service_name}))


def _trace_context(headers: Iterable[tuple[str, str | bytes]]) -> Mapping[str, Sequence[str]]:
    """The headers of W3C's trace context; none where there are two that say who the parent is."""
    found: dict[str, list[str]] = {"traceparent": [], "tracestate": []}
    for name, value in headers:
        if name in found and isinstance(value, str):
            found[name].append(value)
    return found if len(found["traceparent"]) == 1 else {}


def _short(value: Value) -> Value:
    return value[:_LONGEST_VALUE] if isinstance(value, str) else value
