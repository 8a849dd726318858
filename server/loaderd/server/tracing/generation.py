"""The spans of a generation, made of what its worker tells."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from loaderd.server.tracing import names
from loaderd.server.tracing.spans import Span, Value, current, error_of
from loaderd.v1.generation_pb2 import FinishReason, GenerationFinished, StreamGenerateResponse


class GenerationSpans:
    """Tells of a request to a worker as `queue`, `prefill` and `decode`.

    A worker tells at the end how long each took. What ends without that is told by when the
    messages came.

    Args:
        parent: Of what it is a part.
        clock: Monotonic seconds. The request is sent to its worker now.
    """

    def __init__(self, parent: Span, clock: Callable[[], float] = time.monotonic) -> None:
        self._parent = parent
        self._clock = clock
        self._sent = clock()
        self._turn: float | None = None
        self._first: float | None = None
        self._last: float | None = None
        self._prompt_tokens = 0
        self._finished: GenerationFinished | None = None

    def note(self, message: StreamGenerateResponse) -> None:
        """Takes a message that has just come."""
        match message.WhichOneof("event"):
            case "started":
                self._turn = self._clock()
                self._prompt_tokens = message.started.prompt_tokens
            case "delta" if self._first is None:
                self._first = self._clock()
            case "finished":
                self._last = self._clock()
                self._finished = message.finished

    def close(self, error: str) -> None:
        """Tells the spans.

        Args:
            error: What kind of error the request ended with; empty: none.
        """
        attributes: dict[str, int | list[str]] = {}
        if self._turn is not None:
            attributes[names.INPUT_TOKENS] = self._prompt_tokens
        if self._finished is not None:
            self._take_timings(self._finished)
            attributes |= _usage(self._finished)
            error = ""  # whatever happened then, the worker had done its work
        self._parent.set(attributes)
        begins = [("queue", self._sent), ("prefill", self._turn), ("decode", self._first)]
        reached = [(name, begin) for name, begin in begins if begin is not None]
        end = self._clock() if self._last is None else self._last
        ends = [*(begin for _, begin in reached[1:]), end]
        for (name, begin), until in zip(reached, ends, strict=True):
            span = self._parent.child(name, at=begin)
            span.set({key: attributes[key] for key in _OF_STAGE[name] if key in attributes})
            span.end(at=until, error=error if until is end else "")

    def _take_timings(self, finished: GenerationFinished) -> None:
        """Sets the times by the worker's own, counted from when the request was sent."""
        timings = finished.timings
        if not timings.HasField("queue"):
            return
        self._turn = self._sent + timings.queue.ToNanoseconds() / 1e9
        if timings.HasField("prefill"):
            self._first = self._turn + timings.prefill.ToNanoseconds() / 1e9
            self._last = self._first + timings.decode.ToNanoseconds() / 1e9


@contextmanager
def watching(
    attributes: Mapping[str, Value],
) -> Iterator[Callable[[StreamGenerateResponse], None] | None]:
    """Tells of a request to a worker, which is sent now, as a part of what runs now.

    Args:
        attributes: More about what runs now.

    Yields:
        Takes each message when it comes; None: what runs now has no span.
    """
    if (span := current()) is None:
        yield None
        return
    span.set(attributes)
    spans, error = GenerationSpans(span), ""
    try:
        yield spans.note
    except BaseException as raised:
        error = error_of(raised)
        raise
    finally:
        spans.close(error)


_OF_STAGE = {
    "queue": (),
    "prefill": (names.INPUT_TOKENS, names.CACHED_TOKENS),
    "decode": (names.OUTPUT_TOKENS, names.FINISH_REASONS),
}


def _usage(finished: GenerationFinished) -> dict[str, int | list[str]]:
    usage = finished.usage
    reasons = [FinishReason.Name(finish.reason) for finish in finished.finishes]
    return {
        names.INPUT_TOKENS: usage.prompt_tokens,
        names.CACHED_TOKENS: usage.cached_prompt_tokens,
        names.OUTPUT_TOKENS: usage.generated_tokens,
        names.FINISH_REASONS: [reason.removeprefix("FINISH_REASON_").lower() for reason in reasons],
    }
