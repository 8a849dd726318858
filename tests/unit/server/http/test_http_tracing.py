"""The spans of requests over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id

from tests.recorded_spans import SPAN_ID, TRACE_ID, TRACEPARENT, RecordedSpans
from tests.unit.server.box import Box, open_box
from tests.unit.server.http.browser import connect, fetch

PATH = "/v1/completions"


@pytest.fixture
def spans() -> RecordedSpans:
    return RecordedSpans()


@pytest.fixture
async def box(tmp_path: Path, spans: RecordedSpans) -> AsyncIterator[Box]:
    async with open_box(tmp_path, http=True, tracer=spans.tracer) as opened:
        await opened.load()
        spans.clear()
        yield opened


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_and_its_call_are_parts_of_its_callers_trace(
    box: Box, spans: RecordedSpans, stream: bool
) -> None:
    body = {"model": str(box.folder), "prompt": "count 1", "stream": stream}
    await fetch(box.url, PATH, body, traceparent=TRACEPARENT, x_request_id="mine")
    method = "StreamGenerate" if stream else "Generate"
    call = f"loaderd.v1.GenerationService/{method}"
    top = spans.one("completions")
    assert (top.name, top.kind) == (f"POST {PATH}", SpanKind.SERVER)
    assert top.parent is not None
    assert (format_trace_id(top.parent.trace_id), format_span_id(top.parent.span_id)) == (
        TRACE_ID,
        SPAN_ID,
    )
    assert spans.told("completions") == {
        "http.request.method": "POST",
        "http.route": PATH,
        "http.response.status_code": 200,
        "url.scheme": "http",
        "loaderd.request_id": "mine",
    }
    assert spans.parts("completions") == [call]
    assert spans.one(method).kind is SpanKind.INTERNAL
    assert spans.parts(method) == ["queue", "prefill", "decode"]


async def test_a_refusal_is_told_with_its_status(box: Box, spans: RecordedSpans) -> None:
    await fetch(box.url, PATH, {"model": "org/none", "prompt": "x"})
    assert spans.told("completions")["http.response.status_code"] == 404
    assert spans.told("Generate")["loaderd.reason"] == "MODEL_NOT_LOADED"
    assert all(span.status.status_code is StatusCode.UNSET for span in spans.all)


async def test_a_defect_is_told_as_one(
    box: Box, spans: RecordedSpans, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(type(box.registry), "views")
    await fetch(box.url, "/v1/models")
    assert spans.one("models").status.status_code is StatusCode.ERROR
    monkeypatch.undo()


async def test_two_parents_are_none(box: Box, spans: RecordedSpans) -> None:
    reader, writer = await connect(box.url)
    lines = ["GET /v1/models HTTP/1.1", f"host: {urlsplit(box.url).netloc}", "connection: close"]
    lines += [f"traceparent: {TRACEPARENT}"] * 2
    writer.write("\r\n".join([*lines, "", ""]).encode())
    assert b" 200 " in await reader.readline()
    await reader.read()
    writer.close()
    assert spans.one("models").parent is None


async def test_what_is_asked_every_second_has_no_spans(box: Box, spans: RecordedSpans) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/"):
        await fetch(box.url, path, traceparent=TRACEPARENT)
    assert spans.all == []
