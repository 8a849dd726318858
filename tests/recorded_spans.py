"""Spans that stay in this process."""

from __future__ import annotations

from typing import Any

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from loaderd.server.tracing.sdk import SdkTracer

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SPAN_ID = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"
"""What a caller sends who is in a span of a trace that is kept."""


class RecordedSpans:
    """What a tracer made, as soon as it has ended.

    Attributes:
        tracer: The tracer.
    """

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = SdkTracer(provider)

    @property
    def all(self) -> list[ReadableSpan]:
        return sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    @property
    def names(self) -> list[str]:
        return [span.name for span in self.all]

    def one(self, name: str) -> ReadableSpan:
        """The only span of a name, which may be the last part of it."""
        (found,) = (span for span in self.all if span.name.rpartition("/")[2] == name)
        return found

    def parts(self, name: str) -> list[str]:
        """The names of a span's children, in the order of their begins."""
        parent = self.one(name).context
        return [
            span.name
            for span in self.all
            if span.parent is not None and parent is not None and span.parent == parent
        ]

    def told(self, name: str) -> dict[str, Any]:
        """The attributes of a span."""
        return dict(self.one(name).attributes or {})

    def clear(self) -> None:
        self._exporter.clear()
