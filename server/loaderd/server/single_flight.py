"""One piece of work for all who want the same thing at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Generic, TypeVar

from loaderd.server.tracing.spans import begin, ending, error_of, within

K = TypeVar("K", bound=Hashable)
P = TypeVar("P")
R = TypeVar("R")

Publish = Callable[[P], None]
"""Tells all waiters how far the work is."""


class Flight(Generic[P, R]):
    """Work under way, shared by its waiters.

    Attributes:
        waiters: How many wait for it.
        latest: What it published last; None before the first time.
        task: The work.
        span: What tells of it, as a part of what began it; None: nothing does.
    """

    def __init__(self, work: Callable[[Publish[P]], Awaitable[R]], name: str = "") -> None:
        self.waiters = 0
        self.latest: P | None = None
        self._version = 0
        self._changed = asyncio.Event()
        self._abort_error: Exception | None = None
        self.span = begin(name) if name else None
        with within(self.span):
            self.task = asyncio.ensure_future(work(self._publish))
        self.task.add_done_callback(self._ended)

    async def progress(self) -> AsyncIterator[P]:
        """Yields the work's progress until it ends.

        A waiter that is slow, or late, gets the latest value and none of those that it missed.
        """
        seen = 0
        while True:
            changed = self._changed
            if self.latest is not None and self._version != seen:
                seen = self._version
                yield self.latest
            elif self.task.done():
                return
            else:
                await changed.wait()

    async def result(self) -> R:
        """Waits for the work. Cancelling the wait leaves the work alone.

        Raises:
            BaseException: Whatever the work raised.
        """
        try:
            return await asyncio.shield(self.task)
        except asyncio.CancelledError:
            if self.task.cancelled() and self._abort_error is not None:
                raise self._abort_error from None
            raise

    async def abort(self, error: Exception) -> None:
        """Stops the work for all waiters, who get `error`; waits until it has stopped."""
        if self._abort_error is None:
            self._abort_error = error
            self.task.cancel()
        await asyncio.wait([self.task])

    def _publish(self, value: P) -> None:
        self.latest = value
        self._version += 1
        self._wake()

    def _ended(self, task: asyncio.Future[R]) -> None:
        # Seen: asyncio warns of errors that nobody waited for.
        raised = asyncio.CancelledError() if task.cancelled() else task.exception()
        if self.span is not None:
            self.span.end(error="" if raised is None else error_of(raised))
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class SingleFlight(Generic[K, P, R]):
    """Flights by key.

    Who joins a key that has a flight under way shares it. A waiter that leaves does not stop the
    others; when the last one leaves, the work is cancelled.

    Args:
        name: Of the spans that tell of flights; those who join one have a span of their own, which
            is linked with it. Empty: there are none.
    """

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._flights: dict[K, Flight[P, R]] = {}

    @property
    def flights(self) -> Mapping[K, Flight[P, R]]:
        """The flights under way by key."""
        return MappingProxyType(self._flights)

    async def abort(self, key: K, error: Exception) -> Flight[P, R] | None:
        """Stops a key's flight for all its waiters, who get `error`.

        Returns:
            The flight, which has stopped; None: there was none. Who joins the key from now on
            starts anew.
        """
        flight = self._flights.get(key)
        if flight is not None:
            self._land(key, flight)
            await flight.abort(error)
        return flight

    @asynccontextmanager
    async def join(
        self, key: K, work: Callable[[Publish[P]], Awaitable[R]]
    ) -> AsyncIterator[Flight[P, R]]:
        """Joins the key's flight, or starts one with `work`.

        On leaving, waits for a cancelled flight to end, so that what it held is free again.
        """
        flight, waiting = self._flights.get(key), None
        if flight is None:
            flight = self._flights[key] = Flight(work, self._name)
            flight.task.add_done_callback(lambda _: self._land(key, flight))
        elif self._name:
            waiting = begin(f"wait for {self._name}", link=flight.span)
        flight.waiters += 1
        try:
            with ending(waiting):
                yield flight
        finally:
            flight.waiters -= 1
            if flight.waiters == 0 and not flight.task.done():
                self._land(key, flight)
                flight.task.cancel()
                await asyncio.wait([flight.task])

    def _land(self, key: K, flight: Flight[P, R]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
