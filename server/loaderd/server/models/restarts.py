"""Loads models and replicas again whose workers died."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict, deque
from contextvars import Context

from loaderd.server.errors import LoaderdError
from loaderd.server.models.loads import Loads
from loaderd.server.models.record import ModelRecord
from loaderd.server.tracing.spans import Tracer, annotate, running

logger = logging.getLogger(__name__)

MOST_DEATHS = 5
"""For each replica that a model is to have, within `MEMORY_S`; then it stays as it is, FAILED or
with those that it has, until somebody asks for more."""
MEMORY_S = 600.0
_FIRST_WAIT_S = 1.0


class Restarts:
    """Brings models back that somebody wants still: at once, then with growing waits, then never.

    Args:
        loads: Loads them.
        first_wait_s: Seconds before the second restart; doubled for each more.
        tracer: Gets a trace of each restart; None: nobody asked.
    """

    def __init__(
        self, loads: Loads, first_wait_s: float = _FIRST_WAIT_S, tracer: Tracer | None = None
    ) -> None:
        self._tracer = tracer
        self._loads = loads
        self._first_wait_s = first_wait_s
        self._deaths: defaultdict[str, deque[float]] = defaultdict(deque)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._loading: set[str] = set()

    def begin(self, record: ModelRecord) -> None:
        """A model's worker has died."""
        self._note(record, 1)
        if record.id in self._loading:
            return  # it is seen that more are missing when those are there
        if earlier := self._tasks.get(record.id):
            earlier.cancel()  # somebody was faster than its wait
        task = self._tasks[record.id] = asyncio.create_task(
            self._restart(record),
            context=Context(),  # of no call
        )
        task.add_done_callback(lambda _: self._forget(record.id, task))

    async def close(self) -> None:
        """Gives up what has begun."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget(self, model_id: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(model_id) is task:
            del self._tasks[model_id]

    async def _restart(self, record: ModelRecord) -> None:
        while (deaths := self._deaths_of_each(record)) <= MOST_DEATHS:
            if deaths > 1:
                await asyncio.sleep(self._first_wait_s * 2 ** (deaths - 2))
            if not record.lacks_replicas:
                return  # somebody else has loaded it, or does not want it any more
            logger.info(
                "%s %s: loading it again, %d of %d", record.id, record.name, deaths, MOST_DEATHS
            )
            self._loading.add(record.id)
            try:
                with running(self._tracer.begin("restart") if self._tracer is not None else None):
                    annotate(record.span_attributes)
                    loaded = await self._loads.again(record)
                if loaded is not record:
                    return  # other names of the same files came to be loaded
            except LoaderdError as error:
                logger.warning("%s %s: did not come back: %s", record.id, record.name, error)
                self._note(record, record.replicas.missing)
            finally:
                self._loading.discard(record.id)
            if not record.lacks_replicas:
                return
        logger.error("%s %s: given up after %d failures", record.id, record.name, MOST_DEATHS)

    def _note(self, record: ModelRecord, deaths: int) -> None:
        now = time.monotonic()
        for name, times in list(self._deaths.items()):
            while times and times[0] < now - MEMORY_S:
                times.popleft()
            if not times:
                del self._deaths[name]
        self._deaths[record.id].extend([now] * deaths)

    def _deaths_of_each(self, record: ModelRecord) -> int:
        """How often each replica has died or failed to load lately, on average, rounded up."""
        return -(-len(self._deaths[record.id]) // record.replicas.wanted)
