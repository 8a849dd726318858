"""What a collector gets from a daemon, and what the daemon does without one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from loaderd.client import Client
from tests.collector import Collector, told
from tests.daemon import SpawnedDaemon
from tests.hub import Hub, HubRepo
from tests.recorded_spans import SPAN_ID, TRACE_ID

Spawn = Callable[..., SpawnedDaemon]

PROMPT = "xyzzy-plugh-4711"
SECRET = "s" * 30
CALLER = NonRecordingSpan(
    SpanContext(int(TRACE_ID, 16), int(SPAN_ID, 16), False, TraceFlags(TraceFlags.SAMPLED))
)


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[Hub]:
    with Hub(HubRepo.from_folder("org/tiny", tiny_model)) as hub:
        yield hub


def test_a_callers_trace_goes_on_in_the_daemon(hub: Hub, spawn: Spawn) -> None:
    with Collector() as collector:
        daemon = spawn(
            *("--tracing", "--tracing-endpoint", collector.url, "--standby", "0"),
            *("--tracing-service-name", "mine", "--log-format", "json"),
            HF_ENDPOINT=hub.url,
            HF_TOKEN="hf_" + SECRET,
            OTEL_EXPORTER_OTLP_HEADERS=f"authorization=Bearer {SECRET}",
        )
        with Client(daemon.address) as client, trace.use_span(CALLER):
            model = client.load("org/tiny")
            result = model.generate(PROMPT, max_new_tokens=12, ignore_eos=True, request_id="mine")
            model.unload()
        assert daemon.stop() == 0
        assert collector.services == {"mine"}
        assert collector.headers["authorization"] == f"Bearer {SECRET}"

    assert {span.trace_id.hex() for span in collector.spans} == {TRACE_ID}
    calls = [span for span in collector.spans if span.parent_span_id.hex() == SPAN_ID]
    assert [span.name for span in calls] == [
        "loaderd.v1.ModelService/LoadModel",
        "loaderd.v1.GenerationService/Generate",
        "loaderd.v1.ModelService/UnloadModel",
    ]
    assert collector.tree(calls[0]) == {
        "resolve": {},
        "fetch": {
            "download": {"plan": {}, "transfer": {}, "verify": {}},
            "load": {
                "verify": {},
                "placement": {},
                "replica": {"worker": {}, "weights": {}, "engine": {}},
            },
        },
    }
    assert collector.tree(calls[1]) == {"queue": {}, "prefill": {}, "decode": {}}
    assert told(collector.one("load"))["loaderd.model.revision"] == model.info.commit
    download = told(collector.one("download"))
    assert download["loaderd.model.name"] == "org/tiny"
    assert download["loaderd.download.bytes"] > 0
    usage = result.usage
    assert told(collector.one("prefill"))["gen_ai.usage.input_tokens"] == usage.prompt_tokens
    assert told(collector.one("decode"))["gen_ai.usage.output_tokens"] == 12
    by_id = {span.span_id: span for span in collector.spans}
    for span in collector.spans:
        parent = by_id.get(span.parent_span_id, span)
        assert parent.start_time_unix_nano <= span.start_time_unix_nano
        assert span.start_time_unix_nano <= span.end_time_unix_nano <= parent.end_time_unix_nano

    sent = "".join(map(str, collector.spans))
    for secret in (PROMPT, result.text.strip(), SECRET):
        assert secret not in sent
    lines = [json.loads(line) for line in daemon.log.splitlines()]
    mine = [line for line in lines if line.get("request_id") == "mine"]
    assert any("worker" in line for line in mine)
    assert {(line["trace_id"], line["span_id"]) for line in mine} == {
        (TRACE_ID, calls[1].span_id.hex())
    }
    assert SECRET not in daemon.log


def test_a_collector_that_is_not_there_disturbs_nobody(spawn: Spawn, tiny_model: Path) -> None:
    daemon = spawn(
        *("--tracing", "--tracing-endpoint", "http://127.0.0.1:1", "--standby", "0"),
        *("--allow-local", str(tiny_model.parent), "--log-level", "info"),
        OTEL_BSP_SCHEDULE_DELAY="10",
        OTEL_BSP_MAX_QUEUE_SIZE="8",
        OTEL_BSP_MAX_EXPORT_BATCH_SIZE="8",
    )
    with Client(daemon.address) as client:
        model = client.load(str(tiny_model))
        for _ in range(20):
            assert model.generate("Hi", max_new_tokens=2).usage.generated_tokens
    assert daemon.stop() == 0
    about_traces = [line for line in daemon.log.splitlines() if "opentelemetry" in line]
    assert 0 < len(about_traces) < 5
