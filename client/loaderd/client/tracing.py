"""The trace that a caller is in, which its calls carry to the daemon."""

from __future__ import annotations

import sys


def trace_headers() -> tuple[tuple[str, str], ...]:
    """The headers of W3C for the caller's span of OpenTelemetry; none if it is in no span.

    Nothing is imported for callers that do not use OpenTelemetry: a span can be active only where
    its API is imported already.
    """
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    headers: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(headers)
    return tuple(headers.items())
