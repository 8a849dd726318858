"""The trace that a caller is in goes with its calls."""

from __future__ import annotations

from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState

from loaderd.client import AsyncClient, Client
from tests.fake_daemon import FakeDaemon
from tests.recorded_spans import SPAN_ID, TRACE_ID, TRACEPARENT

CALLER = NonRecordingSpan(
    SpanContext(
        int(TRACE_ID, 16),
        int(SPAN_ID, 16),
        is_remote=False,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
        trace_state=TraceState([("vendor", "1")]),
    )
)
HEADERS = {"traceparent": TRACEPARENT, "tracestate": "vendor=1"}


def sent(daemon: FakeDaemon, method: str) -> dict[str, str]:
    """The trace that the last call of a method carried."""
    return {key: value for key, value in daemon.last(method).metadata if key in HEADERS}


def test_calls_and_streams_carry_the_span_that_is_active(
    daemon: FakeDaemon, client: Client
) -> None:
    with trace.use_span(CALLER):
        model = client.load("demo/chat")
        model.generate("Hi", max_new_tokens=1)
        list(model.stream("Hi", max_new_tokens=1))
        client.models()
    methods = ("LoadModel", "Generate", "StreamGenerate", "ListModels")
    assert [sent(daemon, method) for method in methods] == [HEADERS] * len(methods)
    client.models()
    assert sent(daemon, "ListModels") == {}


async def test_so_do_those_of_the_asyncio_client(daemon: FakeDaemon) -> None:
    async with AsyncClient(daemon.address) as client:
        with trace.use_span(CALLER):
            model = await client.load("demo/chat")
            await model.generate("Hi", max_new_tokens=1)
        assert [sent(daemon, each) for each in ("LoadModel", "Generate")] == [HEADERS] * 2
        await client.models()
        assert sent(daemon, "ListModels") == {}
