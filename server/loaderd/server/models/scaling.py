"""Starts workers for models, watches them, and ends those that are not wanted any more."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

from loaderd.server.errors import DeviceMemoryError, ModelNotLoadedError, WorkerDiedError
from loaderd.server.models.lifecycle import ChangeReason, ModelState
from loaderd.server.models.planner import Claim, Planner
from loaderd.server.models.record import ModelRecord
from loaderd.server.models.registry import ModelRegistry
from loaderd.server.models.replicas import Replica
from loaderd.server.store.store import ModelStore
from loaderd.server.supervisor.supervisor import LoadedWorker, Supervisor
from loaderd.server.tracing.spans import stage
from loaderd.worker.v1 import worker_pb2


class Scaling:
    """Gives models the replicas that are wanted of them.

    Args:
        registry: Has the models.
        supervisor: Where workers come from.
        planner: Says whether they fit.
        store: Where the models' files are.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        supervisor: Supervisor,
        planner: Planner,
        store: ModelStore,
    ) -> None:
        self._registry = registry
        self._supervisor = supervisor
        self._planner = planner
        self._store = store
        self._tasks: set[asyncio.Task[None]] = set()

    async def load(self, record: ModelRecord, wanted: int, least: int) -> None:
        """Makes a model READY that is LOADING.

        Args:
            record: The model.
            wanted: How many replicas it is to have.
            least: With how many it is READY where the others do not load; they are missing then.

        Raises:
            LoaderdError: Fewer than `least` were loaded; none is left.
        """
        async with record.replicas.growing:
            started = await self._start(record, wanted, least)
            record.loaded_by(started)
            self._serve(record, started, wanted)
        self._registry.to(record, ModelState.READY)
        self._mend(record)

    async def scale(self, record: ModelRecord, wanted: int) -> None:
        """Gives a READY model so many replicas: all that are missing, or none of them.

        Those that are too many take no more requests, and end when those that they have are over.

        Raises:
            LoaderdError: Those that are missing could not be loaded, and it has those that it had;
                or it is not READY any more.
        """
        async with self._growing(record):
            replicas = record.replicas
            try:
                replicas.recall(wanted)
                missing = wanted - len(replicas.serving)
                started = await self._start(record, missing, missing) if missing > 0 else []
                self._serve(record, started, wanted)
            finally:
                for replica in replicas.dismiss():
                    self._spawn(self._retire(record, replica))
        self._mend(record)  # it may have lost some meanwhile

    async def replenish(self, record: ModelRecord) -> None:
        """Loads the replicas that a READY model is missing, or as many of them as can be.

        Raises:
            LoaderdError: None could be loaded, or it is not READY any more.
        """
        async with self._growing(record):
            if missing := record.replicas.missing:
                started = await self._start(record, missing, 1)
                self._serve(record, started, record.replicas.wanted)

    @asynccontextmanager
    async def _growing(self, record: ModelRecord) -> AsyncIterator[None]:
        """One change of a READY model's replicas at a time; `ModelRecord.abort` ends it.

        Watchers are told of what has changed when it is done.

        Raises:
            LoaderdError: The model is not READY, or does not stay so.
        """
        replicas = record.replicas
        try:
            async with replicas.growing:
                self._registry.check_open()
                if record.state is not ModelState.READY:
                    raise record.failure or ModelNotLoadedError(model=str(record.name))
                before = replicas.wanted, replicas.serving
                record.load_task = asyncio.current_task()
                try:
                    yield
                except asyncio.CancelledError:
                    if record.abort_error is not None:
                        raise record.abort_error from None
                    raise
                finally:
                    record.load_task = record.abort_error = None
            if (replicas.wanted, replicas.serving) != before:
                self._registry.resized(record)
        finally:
            self._registry.use_changed.set()  # while it grew it was in use

    async def _start(self, record: ModelRecord, count: int, least: int) -> list[LoadedWorker]:
        """Loads the model in so many new workers at once, at least in `least` of them.

        Those that share an accelerator go one after the other: each measures what is free of it.

        Raises:
            LoaderdError: Fewer were loaded, and those have been ended.
        """
        loaded: list[LoadedWorker] = []
        turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

        async def start(claim: Claim) -> None:
            asked = time.monotonic()
            async with AsyncExitStack() as turn:
                for device in claim.accelerators:
                    await turn.enter_async_context(turns[device])
                record.has_begun = True
                try:
                    model = await self._supervisor.load(self._command(record, claim), claim.begun)
                except BaseException as error:
                    claim.give_up()
                    if isinstance(error, DeviceMemoryError):
                        raise claim.told(error) from error
                    raise
                claim.settle(model)
                waited = time.monotonic() - asked - model.load_s  # for its turn as well
                loaded.append(replace(model, wait_s=waited))

        is_new = record.state is ModelState.LOADING
        async with AsyncExitStack() as stack:
            with record.timing("placement") if is_new else stage("placement"):
                claims = await stack.enter_async_context(self._planner.claim(record, count, least))
            try:
                outcomes = await asyncio.gather(*map(start, claims), return_exceptions=True)
                alive = [model for model in loaded if not model.worker.ended]
                if len(alive) < least:
                    errors = (each for each in outcomes if each is not None)
                    raise next(errors, WorkerDiedError(model=str(record.name)))
                return alive
            except BaseException:
                await asyncio.gather(*(model.worker.kill() for model in loaded))
                raise

    def _serve(self, record: ModelRecord, models: Sequence[LoadedWorker], wanted: int) -> None:
        """Adds workers to those that serve a model; from now on their end is a loss to it."""
        record.replicas.wanted = wanted
        for model in models:
            self._spawn(self._watch(record, record.replicas.add(model)))
        record.details = record.replicas.serving[0].details

    async def _watch(self, record: ModelRecord, replica: Replica) -> None:
        await replica.worker.wait()
        record.replicas.remove(replica)
        if record.state is ModelState.READY:
            self._lost(record, replica)

    def _lost(self, record: ModelRecord, replica: Replica) -> None:
        """A worker of a READY model has ended, and is none of its replicas any more."""
        is_wanted = self._registry.expiry(record) > time.monotonic()
        record.replicas.recall(record.replicas.wanted)
        if record.replicas.serving:
            reason = ChangeReason.REPLICAS if replica.ending else ChangeReason.WORKER_DIED
            self._registry.resized(record, reason)
        else:
            died = WorkerDiedError(model=str(record.name))
            if record.replicas.growing.locked():
                record.abort(died)
            self._registry.to(record, ModelState.FAILED, died)
        if is_wanted:
            self._mend(record)

    def _mend(self, record: ModelRecord) -> None:
        """Has a model's replicas loaded again if it has lost some."""
        registry = self._registry
        if record.lacks_replicas and registry.on_death is not None and not registry.draining:
            registry.on_death(record)

    async def _retire(self, record: ModelRecord, replica: Replica) -> None:
        """Ends a replica when its requests are over, unless it is kept after all."""
        while replica.leaving and replica.requests:
            await replica.quiet.wait()
        if replica.leaving and record.state is ModelState.READY:
            replica.ending = True
            await replica.worker.close()

    def _command(self, record: ModelRecord, claim: Claim) -> worker_pb2.Load:
        if record.files is None:
            raise RuntimeError("the files of a model are found before it is loaded")
        load = claim.load(record.options)
        load.path, load.model = str(record.files.path), str(record.name)
        load.allow_pickle = self._store.allows_pickle(record.name)
        return load

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
