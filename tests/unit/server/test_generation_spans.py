"""What a worker tells of a generation, as spans."""

from __future__ import annotations

from datetime import timedelta

import pytest

from loaderd.server.tracing.generation import GenerationSpans
from loaderd.v1 import generation_pb2
from loaderd.v1.generation_pb2 import StreamGenerateResponse
from tests.recorded_spans import RecordedSpans


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


STARTED = StreamGenerateResponse(started=generation_pb2.GenerationStarted(prompt_tokens=5))
DELTA = StreamGenerateResponse(delta=generation_pb2.GenerationDelta(text="x"))


def finished(queue: float, prefill: float | None, decode: float) -> StreamGenerateResponse:
    timings = generation_pb2.GenerationTimings()
    timings.queue.FromTimedelta(timedelta(seconds=queue))
    if prefill is not None:
        timings.prefill.FromTimedelta(timedelta(seconds=prefill))
        timings.decode.FromTimedelta(timedelta(seconds=decode))
    end = generation_pb2.GenerationFinished(timings=timings)
    end.usage.prompt_tokens, end.usage.cached_prompt_tokens, end.usage.generated_tokens = 5, 4, 2
    for reason in (generation_pb2.FINISH_REASON_STOP, generation_pb2.FINISH_REASON_LENGTH):
        end.finishes.add(reason=reason)
    return StreamGenerateResponse(finished=end)


@pytest.fixture
def spans() -> RecordedSpans:
    return RecordedSpans()


def seconds(spans: RecordedSpans) -> dict[str, tuple[float, float]]:
    """Of each part, its begin from that of the first part on, and how long it took."""
    parts = [span for span in spans.all if span.name != "call"]
    first = parts[0].start_time or 0
    return {
        span.name: (
            round(((span.start_time or 0) - first) / 1e9, 3),
            round(((span.end_time or 0) - (span.start_time or 0)) / 1e9, 3),
        )
        for span in parts
    }


def test_a_workers_own_times_count_not_those_of_its_messages(spans: RecordedSpans) -> None:
    call, clock = spans.tracer.begin("call"), Clock()
    told = GenerationSpans(call, clock)
    clock.now += 50
    for message in (STARTED, DELTA, DELTA, finished(1, 2, 4)):
        told.note(message)
    told.close("")
    call.end()
    assert seconds(spans) == {"queue": (0, 1), "prefill": (1, 2), "decode": (3, 4)}
    assert spans.told("prefill") == {
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 4,
    }
    assert spans.told("decode") == {
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.response.finish_reasons": ("stop", "length"),
    }
    assert spans.told("call") == spans.told("prefill") | spans.told("decode")


def test_a_client_that_leaves_late_changes_nothing(spans: RecordedSpans) -> None:
    call, clock = spans.tracer.begin("call"), Clock()
    told = GenerationSpans(call, clock)
    told.note(finished(1, 2, 4))
    clock.now += 50
    told.close("CANCELLED")
    assert seconds(spans) == {"queue": (0, 1), "prefill": (1, 2), "decode": (3, 4)}
    assert "error.type" not in spans.told("decode")


def test_what_has_no_first_token_has_no_decode(spans: RecordedSpans) -> None:
    call, clock = spans.tracer.begin("call"), Clock()
    told = GenerationSpans(call, clock)
    clock.now += 3
    told.note(STARTED)
    told.note(finished(1, None, 0))
    told.close("")
    assert seconds(spans) == {"queue": (0, 1), "prefill": (1, 2)}


def test_without_a_workers_times_those_of_its_messages_count(spans: RecordedSpans) -> None:
    call, clock = spans.tracer.begin("call"), Clock()
    told = GenerationSpans(call, clock)
    for message in (STARTED, DELTA, DELTA):
        clock.now += 1
        told.note(message)
    clock.now += 1
    told.close("WORKER_DIED")
    assert seconds(spans) == {"queue": (0, 1), "prefill": (1, 1), "decode": (2, 2)}
    assert spans.told("decode") == {"error.type": "WORKER_DIED"}
    assert "error.type" not in spans.told("prefill")
