"""Spare workers: import time is paid before anybody asks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from loaderd.server.errors import LoaderdError
from loaderd.server.supervisor.worker import Worker

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 1.0
_LONGEST_BACKOFF_S = 60.0


class StandbyPool:
    """Keeps `size` workers that have imported everything and wait for a load.

    Args:
        size: Number of spares; with 0, `take` starts a worker when it is asked.
        start: Launches a worker.
    """

    def __init__(self, size: int, start: Callable[[], Awaitable[Worker]]) -> None:
        self._size = size
        self._start = start
        self._spares: list[Worker] = []
        self._wanted = asyncio.Event()
        self._adding = asyncio.Lock()
        self._filler: asyncio.Task[None] | None = None

    @property
    def ready(self) -> int:
        """Number of spares that could load now."""
        return sum(1 for worker in self._spares if _is_ready(worker))

    def open(self) -> None:
        """Starts the spares, and a new one for each that dies."""
        self._filler = asyncio.create_task(self._fill())
        self.replenish()

    def replenish(self) -> None:
        """Starts the spares that are missing.

        `take` does not: a new spare's imports would slow the load that the taken one is for.
        """
        self._wanted.set()

    async def take(self) -> Worker:
        """A worker that is ready to load: a spare, or a new one.

        Raises:
            LoaderdError: The worker died while it started.
            OSError: It could not be started.
        """
        self._spares = [worker for worker in self._spares if not worker.ended]
        # The oldest spare is ready, or will be before a new worker could be.
        worker = self._spares.pop(0) if self._spares else await self._start()
        try:
            await asyncio.shield(worker.link.standby)
        except BaseException:
            await worker.kill()
            raise
        return worker

    async def wait(self) -> None:
        """Waits until a spare is up; starts one if there is none.

        Raises:
            LoaderdError: It died while it started.
            OSError: It could not be started.
        """
        spare = await self._add(1) or self._spares[0]
        await asyncio.shield(spare.link.standby)

    async def close(self) -> None:
        """Ends the spares."""
        if self._filler is not None:
            self._filler.cancel()
            await asyncio.wait([self._filler])
        await asyncio.gather(*(worker.close() for worker in self._spares))

    async def _add(self, size: int) -> Worker | None:
        """Starts one spare if there are fewer than `size`; None if there are as many."""
        async with self._adding:
            self._spares = [worker for worker in self._spares if not worker.ended]
            if len(self._spares) >= size:
                return None
            worker = await self._start()
            self._spares.append(worker)
            return worker

    async def _fill(self) -> None:
        backoff = _FIRST_BACKOFF_S
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                while worker := await self._add(self._size):
                    await asyncio.shield(worker.link.standby)
                    backoff = _FIRST_BACKOFF_S
            except (OSError, LoaderdError) as error:
                reason = error.reason if isinstance(error, LoaderdError) else error
                logger.error("a standby worker did not start: %s; again in %.0f s", reason, backoff)
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, _LONGEST_BACKOFF_S)
                self._wanted.set()


def _is_ready(worker: Worker) -> bool:
    standby = worker.link.standby
    return not worker.ended and standby.done() and standby.exception() is None
