"""Every change of a model's state, to all who watch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from loaderd.server.errors import LoaderdError, SlowConsumerError
from loaderd.server.models.lifecycle import ChangeReason, ModelState
from loaderd.server.models.record import ModelView

_MAX_WAITING = 4096


@dataclass(frozen=True)
class ModelEvent:
    """One change of state.

    Attributes:
        sequence: Grows by one with each event.
        time: When it happened.
        previous: The state before; None for a model's first event.
        model: The model after the change.
        reason: Why it changed.
        previous_s: Seconds that it had been in the state before; None for a model's first event.
    """

    sequence: int
    time: datetime
    previous: ModelState | None
    model: ModelView
    reason: ChangeReason
    previous_s: float | None


class Subscription:
    """The events since a watcher came."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[ModelEvent | LoaderdError] = asyncio.Queue()

    def put(self, item: ModelEvent | LoaderdError) -> None:
        """Adds an event, or the error that ends the subscription."""
        if self._waiting.qsize() < _MAX_WAITING:
            self._waiting.put_nowait(item)
        elif self._waiting.qsize() == _MAX_WAITING:
            self._waiting.put_nowait(SlowConsumerError(limit=_MAX_WAITING, unit="events"))

    async def __aiter__(self) -> AsyncIterator[ModelEvent]:
        """The events, without gaps.

        Raises:
            SlowConsumerError: Too many events waited.
            DrainingError: The daemon shuts down.
        """
        while True:
            item = await self._waiting.get()
            if isinstance(item, LoaderdError):
                raise item
            yield item


class EventBus:
    """Carries events from the registry to its watchers."""

    def __init__(self) -> None:
        self._sequence = 0
        self._subscriptions: set[Subscription] = set()

    def publish(
        self,
        time: datetime,
        previous: ModelState | None,
        model: ModelView,
        reason: ChangeReason,
        previous_s: float | None,
    ) -> None:
        """Tells all watchers."""
        self._sequence += 1
        event = ModelEvent(self._sequence, time, previous, model, reason, previous_s)
        for subscription in self._subscriptions:
            subscription.put(event)

    def end(self, error: LoaderdError) -> None:
        """Ends all subscriptions with `error`."""
        for subscription in self._subscriptions:
            subscription.put(error)

    @contextmanager
    def subscribe(self) -> Iterator[Subscription]:
        """The events from now on."""
        subscription = Subscription()
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)
