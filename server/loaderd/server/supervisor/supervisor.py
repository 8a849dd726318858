"""All workers of the daemon."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from loaderd.server.errors import LoaderdError, WorkerDiedError
from loaderd.server.supervisor.launcher import WorkerLauncher
from loaderd.server.supervisor.link_server import LinkServer
from loaderd.server.supervisor.standby import StandbyPool
from loaderd.server.supervisor.worker import Worker, WorkerLimits
from loaderd.server.tracing import names
from loaderd.server.tracing.spans import current, stage
from loaderd.v1 import system_pb2
from loaderd.worker.v1 import worker_pb2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedWorker:
    """A worker that holds a model.

    Attributes:
        worker: The worker.
        loaded: What it said of the model.
        wait_s: Seconds until a worker was ready to load.
        load_s: Seconds that the worker took to load.
    """

    worker: Worker
    loaded: worker_pb2.Loaded
    wait_s: float
    load_s: float


class Supervisor:
    """Starts, watches and ends workers.

    Args:
        folder: The daemon's private folder.
        launcher: Starts worker processes.
        limits: Bounds on workers.
    """

    def __init__(self, folder: Path, launcher: WorkerLauncher, limits: WorkerLimits) -> None:
        self._launcher = launcher
        self._limits = limits
        self._server = LinkServer(folder)
        self._workers: set[Worker] = set()
        self._watches: set[asyncio.Task[None]] = set()
        self._pool = StandbyPool(limits.standby, self._start_worker)
        self._latest: worker_pb2.Standby | None = None
        self._measured_at = 0.0
        self._first_seen = asyncio.Event()
        self._asking = asyncio.Lock()

    async def start(self) -> None:
        """Listens for workers and starts the spares."""
        await self._server.start()
        self._pool.open()

    async def close(self) -> None:
        """Ends all workers."""
        await self._pool.close()
        await asyncio.gather(*(worker.close() for worker in self._workers))
        await self._server.close()

    def kill(self) -> None:
        """Ends all workers at once."""
        for worker in self._workers:
            worker.end_now()

    async def load(
        self, load: worker_pb2.Load, on_begin: Callable[[Worker], None] = lambda _: None
    ) -> LoadedWorker:
        """Loads a model in a worker of its own. Cancelling it ends that worker.

        Args:
            load: What to load.
            on_begin: Called with the worker when it begins.

        Raises:
            LoaderdError: The load failed; WorkerDiedError when the worker ended, or did not
                answer within the load time-out.
        """
        with stage("replica"):
            return await self._load(load, on_begin)

    async def _load(
        self, load: worker_pb2.Load, on_begin: Callable[[Worker], None]
    ) -> LoadedWorker:
        started = time.monotonic()
        worker: Worker | None = None
        try:
            async with asyncio.timeout(self._limits.load_timeout):
                with stage("worker"):
                    worker = await self._pool.take()
                worker.model = load.model
                begun = time.monotonic()
                on_begin(worker)
                loaded = await asyncio.shield(worker.link.load(load))
                _tell(worker, loaded, begun)
                return LoadedWorker(worker, loaded, begun - started, time.monotonic() - begun)
        except BaseException as error:
            if worker is not None:
                await worker.kill()  # what it held is free when the load has ended
            if isinstance(error, TimeoutError | OSError):
                logger.error("no worker for %s: %r", load.model, error)
                raise WorkerDiedError(model=load.model) from error
            if isinstance(error, WorkerDiedError):
                raise WorkerDiedError(model=load.model) from error
            raise
        finally:
            self._pool.replenish()

    @property
    def standby_workers(self) -> int:
        """Number of spares that could load now."""
        return self._pool.ready

    @property
    def versions(self) -> Mapping[str, str]:
        """Releases of the workers' libraries; empty until the first worker is up."""
        return {} if self._latest is None else self._latest.versions

    async def devices(self) -> list[system_pb2.Device]:
        """The devices as the latest worker saw them; waits for the first worker.

        Raises:
            WorkerDiedError: No worker could be started within the load time-out.
        """
        try:
            async with asyncio.timeout(self._limits.load_timeout), self._asking:
                if self._latest is None:
                    await self._pool.wait()  # it is the worker of the next load
                await self._first_seen.wait()
        except (TimeoutError, OSError) as error:
            raise WorkerDiedError(model="a worker that looks at the devices") from error
        return [] if self._latest is None else list(self._latest.devices)

    @property
    def measured_at(self) -> float:
        """Monotonic time when the latest worker looked at the devices; 0 before."""
        return self._measured_at

    async def _start_worker(self) -> Worker:
        started = time.monotonic()
        worker = await Worker.start(self._launcher, self._server, self._limits)
        self._workers.add(worker)
        watch = asyncio.create_task(self._watch(worker, started))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)
        return worker

    async def _watch(self, worker: Worker, started: float) -> None:
        try:
            self._latest = await asyncio.shield(worker.link.standby)
            self._measured_at = self._latest.measured_at or started
            self._first_seen.set()
        except LoaderdError:
            pass  # it died while it started: whoever wanted it is told by the link
        await worker.wait()
        self._workers.discard(worker)
        self._pool.replenish()


def _tell(worker: Worker, loaded: worker_pb2.Loaded, begun: float) -> None:
    """Tells the steps that a worker says it took, from when it was asked to load."""
    if (span := current()) is None:
        return
    span.set({names.WORKER: worker.pid})
    read = begun + loaded.weights.ToNanoseconds() / 1e9
    span.child("weights", at=begun).end(at=read)
    span.child("engine", at=read).end()
