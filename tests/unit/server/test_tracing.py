"""The spans of calls, loads and generations, as a collector would get them."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id

from loaderd.server.errors import ModelUnsupportedError
from loaderd.server.logs.lines import JsonFormatter
from loaderd.server.models.loads import OnDemand
from loaderd.server.models.manifest import Declared, Manifest
from loaderd.server.supervisor.launcher import worker_environment
from loaderd.server.tracing import names
from loaderd.v1 import generation_pb2, model_pb2
from tests.recorded_spans import SPAN_ID, TRACE_ID, TRACEPARENT, RecordedSpans
from tests.unit.server.box import Box, make_model, open_box, reason_of
from tests.waiting import until_in_loop as until

GENERATE = "loaderd.v1.GenerationService/Generate"


@pytest.fixture
def spans() -> RecordedSpans:
    return RecordedSpans()


@pytest.fixture
async def box(tmp_path: Path, spans: RecordedSpans) -> AsyncIterator[Box]:
    async with open_box(
        tmp_path, on_demand=OnDemand.CACHED, restart_wait_s=0.01, tracer=spans.tracer
    ) as opened:
        yield opened


@pytest.fixture
async def loaded(box: Box, spans: RecordedSpans) -> Box:
    await box.load()
    spans.clear()
    return box


def request(box: Box, text: str) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(model=str(box.folder), text=text)


async def generate(box: Box, text: str, *metadata: tuple[str, str]) -> None:
    await box.generation.Generate(request(box, text), metadata=metadata, timeout=30)


async def test_a_generation_is_a_part_of_its_callers_trace(
    loaded: Box, spans: RecordedSpans
) -> None:
    state = ("tracestate", "vendor=1,other=2")
    await generate(loaded, "count 3", ("traceparent", TRACEPARENT), state, ("x-request-id", "mine"))
    call = spans.one("Generate")
    assert (call.name, call.kind) == (GENERATE, SpanKind.SERVER)
    assert {format_trace_id(span.context.trace_id) for span in spans.all if span.context} == {
        TRACE_ID
    }
    assert call.parent is not None
    assert format_span_id(call.parent.span_id) == SPAN_ID
    assert call.context is not None
    assert call.context.trace_state.to_header() == state[1]
    assert spans.parts("Generate") == ["queue", "prefill", "decode"]
    (record,) = await loaded.list()
    worker = loaded.launcher.workers[0].pid
    usage = {
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ("length",),
    }
    assert spans.told("Generate") == usage | {
        "rpc.system.name": "grpc",
        "rpc.method": GENERATE,
        "rpc.response.status_code": "OK",
        "gen_ai.request.model": str(loaded.folder),
        "loaderd.model.name": str(loaded.folder),
        "loaderd.model.id": record.id,
        "loaderd.request_id": "mine",
        "loaderd.worker.pid": worker,
    }
    assert spans.told("prefill") | spans.told("decode") == usage
    assert all(span.status.status_code is StatusCode.UNSET for span in spans.all)


async def test_a_stream_has_the_same_parts(loaded: Box, spans: RecordedSpans) -> None:
    async for _ in loaded.stream("count 2"):
        pass
    await until(lambda: len(spans.all) == 4)
    assert spans.parts("StreamGenerate") == ["queue", "prefill", "decode"]


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("traceparent", "")],
        [("traceparent", "nonsense")],
        [("traceparent", f"ff-{TRACE_ID}-{SPAN_ID}-01")],
        [("traceparent", f"00-{'0' * 32}-{SPAN_ID}-01")],
        [("traceparent", f"00-{TRACE_ID}-{'0' * 16}-01")],
        [("traceparent", f"00-{TRACE_ID.upper()}-{SPAN_ID}-01")],
        [("traceparent", f"{TRACEPARENT}-more")],
        [("traceparent", "x" * 4000), ("tracestate", "=")],
    ],
)
async def test_what_is_no_trace_context_begins_a_trace(
    loaded: Box, spans: RecordedSpans, headers: list[tuple[str, str]]
) -> None:
    await generate(loaded, "count 1", *headers)
    call = spans.one("Generate")
    assert call.parent is None
    assert call.context is not None
    assert format_trace_id(call.context.trace_id) != TRACE_ID


async def test_a_bad_tracestate_is_left_out_and_not_quoted_in_the_log(
    loaded: Box, spans: RecordedSpans, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await generate(loaded, "count 1", ("traceparent", TRACEPARENT), ("tracestate", "a b c=plugh"))
    context = spans.one("Generate").context
    assert context is not None
    assert (format_trace_id(context.trace_id), context.trace_state) == (TRACE_ID, {})
    assert "plugh" not in caplog.text


async def test_a_trace_that_its_caller_does_not_keep_is_not_kept(
    loaded: Box, spans: RecordedSpans
) -> None:
    await generate(loaded, "count 1", ("traceparent", f"00-{TRACE_ID}-{SPAN_ID}-00"))
    assert spans.all == []


async def test_a_load_tells_its_steps(box: Box, spans: RecordedSpans) -> None:
    model = await box.load(replicas=2)
    assert spans.parts("LoadModel") == ["resolve", "load"]
    assert spans.parts("load") == ["placement", "replica", "replica"]
    told = {"loaderd.model.name": str(box.folder), "loaderd.model.id": model.id}
    assert spans.told("load") == told
    spans.clear()
    await box.load(replicas=3)
    assert spans.parts("LoadModel") == ["resolve", "load", "scale"]
    assert (spans.parts("load"), spans.told("load")) == ([], told)
    assert spans.parts("scale") == ["placement", "replica"]


async def test_a_replica_tells_what_its_worker_did(box: Box, spans: RecordedSpans) -> None:
    await box.load()
    assert spans.parts("load") == ["placement", "replica"]
    assert spans.parts("replica") == ["worker", "weights", "engine"]
    assert spans.told("replica") == {"loaderd.worker.pid": box.launcher.workers[0].pid}
    assert spans.told("LoadModel")["loaderd.model.name"] == str(box.folder)


async def test_who_waits_for_a_load_is_linked_with_it(box: Box, spans: RecordedSpans) -> None:
    box.launcher.load_gate.clear()
    first = asyncio.create_task(box.load())
    await until(lambda: box.launcher.loads == 1)
    second = asyncio.create_task(generate(box, "count 1", ("traceparent", TRACEPARENT)))
    await until(lambda: spans.names.count("resolve") > 1)
    box.launcher.load_gate.set()
    await asyncio.gather(first, second)
    assert spans.parts("LoadModel") == ["resolve", "load"]
    assert "wait for load" in spans.parts("Generate")
    (link,) = spans.one("wait for load").links
    assert link.context == spans.one("load").context


async def test_a_load_that_fails_says_why(box: Box, spans: RecordedSpans) -> None:
    box.launcher.load_error = ModelUnsupportedError(model="x", problem="y")
    load = box.models.LoadModel(model_pb2.LoadModelRequest(model=str(box.folder)))
    assert await reason_of(load) == "MODEL_UNSUPPORTED"
    for name in ("load", "replica"):
        assert spans.one(name).status.status_code is StatusCode.ERROR
        assert spans.told(name)["error.type"] == "MODEL_UNSUPPORTED"
    told = spans.told("LoadModel")
    assert told["rpc.response.status_code"] == "FAILED_PRECONDITION"
    assert told["loaderd.reason"] == "MODEL_UNSUPPORTED"
    # It is the daemon's answer, and not its failure.
    assert spans.one("LoadModel").status.status_code is StatusCode.UNSET


async def test_a_generation_that_is_refused_says_where_and_why(
    loaded: Box, spans: RecordedSpans
) -> None:
    assert await reason_of(loaded.generation.Generate(request(loaded, "fail"))) == "DEVICE_MEMORY"
    assert spans.parts("Generate") == ["queue", "prefill"]
    assert spans.one("queue").status.status_code is StatusCode.UNSET
    assert spans.told("prefill")["error.type"] == "DEVICE_MEMORY"
    told = spans.told("Generate")
    assert told["rpc.response.status_code"] == "RESOURCE_EXHAUSTED"
    assert told["loaderd.reason"] == "DEVICE_MEMORY"
    assert spans.one("Generate").status.status_code is StatusCode.UNSET


async def test_a_generation_whose_worker_dies_is_an_error(
    loaded: Box, spans: RecordedSpans
) -> None:
    call = loaded.stream("hang")
    assert (await call.read()).HasField("started")
    loaded.launcher.workers[0].kill()
    assert await reason_of(call.read()) == "WORKER_DIED"
    assert spans.told("prefill")["error.type"] == "WORKER_DIED"
    told = spans.told("StreamGenerate")
    assert (told["rpc.response.status_code"], told["error.type"]) == ("UNAVAILABLE", "WORKER_DIED")
    assert spans.one("StreamGenerate").status.status_code is StatusCode.ERROR


async def test_a_generation_that_is_cancelled_ends_its_spans(
    loaded: Box, spans: RecordedSpans
) -> None:
    call = loaded.stream("hang")
    assert (await call.read()).HasField("started")
    call.cancel()
    await until(lambda: "loaderd.v1.GenerationService/StreamGenerate" in spans.names)
    assert spans.parts("StreamGenerate") == ["queue", "prefill"]
    assert spans.told("prefill")["error.type"] == "CANCELLED"
    assert spans.told("StreamGenerate")["rpc.response.status_code"] == "CANCELLED"
    assert all(span.status.status_code is StatusCode.UNSET for span in spans.all)


async def test_what_the_daemon_does_by_itself_begins_traces(box: Box, spans: RecordedSpans) -> None:
    manifest = Manifest([Declared(str(box.folder))], box.registry, box.loads, tracer=spans.tracer)
    await manifest.loaded()
    assert spans.one("preload").parent is None
    assert spans.told("preload") == {"loaderd.model.name": str(box.folder)}
    assert spans.parts("preload") == ["resolve", "load"]
    spans.clear()
    box.launcher.workers[0].kill()
    await until(lambda: "restart" in spans.names)
    assert spans.one("restart").parent is None
    assert spans.parts("restart") == ["resolve", "load"]


async def test_probes_and_reflection_have_no_spans(box: Box, spans: RecordedSpans) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async with grpc.aio.insecure_channel(box.tcp) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        await stub.Check(health_pb2.HealthCheckRequest())
    assert spans.all == []


async def test_log_lines_name_the_trace_and_so_do_commands_for_workers(
    loaded: Box, spans: RecordedSpans, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    lines: list[dict[str, Any]] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(  # type: ignore[method-assign]
        json.loads(JsonFormatter().format(record))
    )
    logging.getLogger("loaderd.server.rpc.call").addHandler(handler)
    try:
        await generate(loaded, "count 1", ("traceparent", TRACEPARENT))
    finally:
        logging.getLogger("loaderd.server.rpc.call").removeHandler(handler)
    context = spans.one("Generate").context
    assert context is not None
    ids = {"trace_id": TRACE_ID, "span_id": format_span_id(context.span_id)}
    assert [{key: line[key] for key in ids} for line in lines] == [ids]
    (trace,) = loaded.launcher.workers[0].traces
    assert {"trace_id": trace.trace_id, "span_id": trace.span_id} == ids


def test_the_docs_name_every_attribute() -> None:
    docs = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
    section = docs.partition("\n## Traces\n")[2].partition("\n## ")[0]
    table = section.partition("| Attribute |")[2]
    named = {name for name in re.findall("`([a-z_.]+)`", table) if "." in name}
    assert named == {value for name, value in vars(names).items() if name.isupper()}


def test_the_collectors_secrets_go_to_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS")
    for variable in variables:
        monkeypatch.setenv(variable, "authorization=plugh")
    assert not set(variables) & worker_environment().keys()


async def test_without_tracing_nothing_is_told(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        await box.load()
        await generate(box, "count 1", ("traceparent", TRACEPARENT))
        worker = box.launcher.workers[0]
        assert [trace.trace_id for trace in worker.traces] == [""]
        assert not worker.loads[0].HasField("trace")


async def test_a_long_name_is_cut(box: Box, spans: RecordedSpans) -> None:
    load = box.models.LoadModel(model_pb2.LoadModelRequest(model="x" * 100_000))
    assert await reason_of(load) == "INVALID_NAME"
    assert len(spans.told("LoadModel")["loaderd.model.name"]) == 256


async def test_each_model_of_a_box_has_a_load_of_its_own(
    box: Box, spans: RecordedSpans, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other")
    await asyncio.gather(box.load(), box.load(other))
    models = {
        dict(span.attributes or {})["loaderd.model.name"]
        for span in spans.all
        if span.name == "load"
    }
    assert models == {str(box.folder), str(other)}
