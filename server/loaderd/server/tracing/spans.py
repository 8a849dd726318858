"""What takes time in the daemon, told as it happens. Without tracing there is no span anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from loaderd.server.errors import LoaderdError

CANCELLED = "CANCELLED"
"""The error of what was not wanted any more, which is no failure."""

Value = str | bool | int | float | Sequence[str]


class Span(Protocol):
    """Something that takes time."""

    @property
    def ids(self) -> Mapping[str, str]:
        """`trace_id` and `span_id`, as hex digits; empty if there are none."""

    def child(self, name: str, *, at: float | None = None, link: Span | None = None) -> Span:
        """Begins a part of it.

        Args:
            name: One of few.
            at: Monotonic time of its begin, in seconds; None: now.
            link: A span of this or another trace that it has to do with.
        """

    def set(self, attributes: Mapping[str, Value]) -> None:
        """Says more of it. No prompts, outputs, tokens, secrets, or metadata of callers."""

    def end(self, *, at: float | None = None, error: str = "") -> None:
        """Ends it.

        Args:
            at: Monotonic time of its end, in seconds; None: now.
            error: What kind of error it ended with; one of few. Empty: none.
        """


class Tracer(Protocol):
    """Begins traces."""

    def serve(self, name: str, headers: Iterable[tuple[str, str | bytes]]) -> Span:
        """Begins the span of a call that is served.

        Args:
            name: One of few.
            headers: What came with it, by names in lower case. Where they hold a trace context of
                W3C, the span belongs to that trace; else it begins one.
        """

    def begin(self, name: str) -> Span:
        """Begins the span of what the daemon does by itself, and a trace with it."""


_current: ContextVar[Span | None] = ContextVar("span", default=None)


def current() -> Span | None:
    """The span of what runs now; None: it has none."""
    return _current.get()


def enter(span: Span) -> None:
    """Makes a span that of this task, and of those that it starts from now on."""
    _current.set(span)


@contextmanager
def within(span: Span | None) -> Iterator[None]:
    """Makes a span that of what runs inside; None changes nothing."""
    if span is None:
        yield
        return
    token = _current.set(span)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def ending(span: Span | None) -> Iterator[None]:
    """Ends a span with what runs inside."""
    error = ""
    try:
        yield
    except BaseException as raised:
        error = error_of(raised)
        raise
    finally:
        if span is not None:
            span.end(error=error)


@contextmanager
def running(span: Span | None) -> Iterator[None]:
    """As `within`, and the span ends with what runs inside."""
    with ending(span), within(span):
        yield


def begin(name: str, link: Span | None = None) -> Span | None:
    """Begins a part of what runs now, see `Span.child`; None: that has no span."""
    parent = current()
    return None if parent is None else parent.child(name, link=link)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Tells what runs inside as a part of what runs now."""
    with running(begin(name)):
        yield


def annotate(attributes: Mapping[str, Value]) -> None:
    """Says more of what runs now."""
    if (span := current()) is not None:
        span.set(attributes)


def error_of(raised: BaseException) -> str:
    """What kind of error this is, for `Span.end`."""
    if isinstance(raised, LoaderdError):
        return raised.reason
    return CANCELLED if isinstance(raised, asyncio.CancelledError | GeneratorExit) else "INTERNAL"
