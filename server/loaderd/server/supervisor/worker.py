"""One worker process, from its launch to its end."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time

from loaderd.server.errors import LoaderdError, WorkerDiedError
from loaderd.server.supervisor.launcher import WorkerLauncher, WorkerProcess
from loaderd.server.supervisor.link import WorkerLink
from loaderd.server.supervisor.link_server import LinkServer

logger = logging.getLogger(__name__)

_SHUTDOWN_GRACE_S = 3.0
_WATCH_INTERVAL_S = 0.5


class Worker:
    """A worker process and the link to it.

    Its end, whatever the cause, fails all that waits on the link within a second: a process that
    ends is noticed at once, one that stops answering after `heartbeat_timeout`.

    Attributes:
        model: Name of the model that it was given; empty while it is a spare.
        link: The stream to it.
    """

    def __init__(self, process: WorkerProcess, link: WorkerLink, heartbeat_timeout: float) -> None:
        self.model = ""
        self.link = link
        self._process = process
        self._heartbeat_timeout = heartbeat_timeout
        self._end_error: LoaderdError | None = None
        self._watch = asyncio.create_task(self._watch_process())

    @classmethod
    async def start(
        cls,
        launcher: WorkerLauncher,
        server: LinkServer,
        heartbeat_timeout: float,
        max_stream_bytes: int,
    ) -> Worker:
        """Launches a worker; it is not attached yet.

        Raises:
            OSError: The process could not be started.
        """
        worker_id, token = secrets.token_hex(8), secrets.token_hex(32)
        link = WorkerLink(max_stream_bytes)
        server.expect(worker_id, token, link)
        try:
            process = await launcher.launch(worker_id, token, server.address)
        except OSError:
            server.forget(worker_id)
            raise
        worker = cls(process, link, heartbeat_timeout)
        worker._watch.add_done_callback(lambda _: server.forget(worker_id))
        return worker

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._watch.done()

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
            self.kill()
            await self.wait()

    def kill(self) -> None:
        """Ends the process at once."""
        self._process.kill()

    async def _watch_process(self) -> None:
        exited = asyncio.ensure_future(self._process.wait())
        try:
            while not exited.done():
                await asyncio.wait([exited], timeout=_WATCH_INTERVAL_S)
                silence = time.monotonic() - self.link.last_seen
                if silence > self._heartbeat_timeout and not exited.done():
                    logger.error("worker %d gave no sign of life for %.0f s", self.pid, silence)
                    self.kill()
                    await exited
            logger.info("worker %d ended with code %d", self.pid, exited.result())
        finally:
            exited.cancel()
            self.kill()
            self.link.fail(self._end_error or WorkerDiedError(model=self.model))
