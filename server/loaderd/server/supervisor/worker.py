"""One worker process, from its launch to its end."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass

from loaderd.server.errors import LoaderdError, WorkerDiedError
from loaderd.server.supervisor.launcher import WorkerLauncher, WorkerProcess
from loaderd.server.supervisor.link import WorkerLink
from loaderd.server.supervisor.link_server import LinkServer

logger = logging.getLogger(__name__)

_SHUTDOWN_GRACE_S = 3.0
_KILL_GRACE_S = 10.0
_WATCH_INTERVAL_S = 0.5


@dataclass(frozen=True)
class WorkerLimits:
    """Bounds on workers.

    Attributes:
        standby: Number of spare workers.
        load_timeout: Seconds that a worker may take to start and load.
        heartbeat_timeout: Seconds without a sign of life before a worker is ended.
        max_stream_bytes: Most bytes that may wait for one slow client.
    """

    standby: int
    load_timeout: float
    heartbeat_timeout: float
    max_stream_bytes: int


class Worker:
    """A worker process and the link to it.

    Its end, whatever the cause, fails all that waits on the link within a second: a process that
    ends is noticed at once, one that stops answering after the heartbeat time-out. While it
    imports its libraries, which may hold up its heartbeats, the load time-out holds.

    Attributes:
        link: The stream to it.
    """

    def __init__(self, process: WorkerProcess, link: WorkerLink, limits: WorkerLimits) -> None:
        self.link = link
        self._model = ""
        self._process = process
        self._limits = limits
        self._end_error: LoaderdError | None = None
        # In no call's context: it outlives the call that it was started for.
        self._watch = asyncio.create_task(self._watch_process(), context=Context())

    @classmethod
    async def start(
        cls, launcher: WorkerLauncher, server: LinkServer, limits: WorkerLimits
    ) -> Worker:
        """Launches a worker; it is not attached yet.

        Raises:
            OSError: The process could not be started.
        """
        worker_id, token = secrets.token_hex(8), secrets.token_hex(32)
        link = WorkerLink(limits.max_stream_bytes)
        server.expect(worker_id, token, link)
        try:
            process = await launcher.launch(worker_id, token, server.address)
        except BaseException:
            server.forget(worker_id)
            raise
        worker = cls(process, link, limits)
        worker._watch.add_done_callback(lambda _: server.forget(worker_id))
        return worker

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def model(self) -> str:
        """Name of the model that it was given; empty while it is a spare."""
        return self._model

    @model.setter
    def model(self, name: str) -> None:
        self._model = name
        self._process.serves(name)

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._watch.done()

    def on_end(self, callback: Callable[[], None]) -> None:
        """Calls `callback` when the process has ended."""
        self._watch.add_done_callback(lambda _: callback())

    async def wait(self) -> None:
        """Waits for the end of the process. Cancelling the wait leaves it alone."""
        await asyncio.shield(self._watch)

    async def close(self, error: LoaderdError | None = None) -> None:
        """Ends the process: asks it to, and kills it when it does not end soon.

        Args:
            error: What whoever still waits on it gets; default: WorkerDiedError.
        """
        self._end_error = error
        if error is not None:
            self.link.fail(error)
        self.link.shutdown()
        try:
            async with asyncio.timeout(_SHUTDOWN_GRACE_S):
                await self.wait()
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """Ends the process at once and waits for it, though not for one that the kernel holds."""
        self.end_now()
        try:
            async with asyncio.timeout(_KILL_GRACE_S):
                await self.wait()
        except TimeoutError:
            logger.error(
                "worker %d does not end; it may hold its memory still", self.pid, extra=self._fields
            )

    def end_now(self) -> None:
        """Ends the process at once, without waiting for it."""
        self._process.kill()

    @property
    def _fields(self) -> dict[str, object]:
        """What lines of the log say of it."""
        return {"worker": self.pid, "model": self._model}

    async def _watch_process(self) -> None:
        exited = asyncio.ensure_future(self._process.wait())
        try:
            while not exited.done():
                await asyncio.wait([exited], timeout=_WATCH_INTERVAL_S)
                silence = time.monotonic() - self.link.last_seen
                started = self.link.standby.done()
                limit = self._limits.heartbeat_timeout if started else self._limits.load_timeout
                if silence > limit and not exited.done():
                    logger.error(
                        "worker %d gave no sign of life for %.0f s",
                        self.pid,
                        silence,
                        extra=self._fields,
                    )
                    self.end_now()
                    await exited
            code = exited.result()
            level = logging.INFO if code == 0 else logging.WARNING
            logger.log(level, "worker %d ended with code %d", self.pid, code, extra=self._fields)
        finally:
            exited.cancel()
            self.end_now()
            self.link.fail(self._end_error or WorkerDiedError(model=self.model))
