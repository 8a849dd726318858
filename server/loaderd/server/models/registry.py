"""The models that the daemon holds: who they are, who uses them, and their end."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from typing import Any, TypeVar

from loaderd.server.access.caller import Caller
from loaderd.server.errors import (
    ClientLimitError,
    DrainingError,
    InvalidArgumentError,
    LoaderdError,
    ModelInUseError,
    ModelNotLoadedError,
    ModelUnloadedError,
    QueueFullError,
)
from loaderd.server.models.events import EventBus
from loaderd.server.models.keep_alive import PINNED, KeepAlive
from loaderd.server.models.leases import Leases
from loaderd.server.models.lifecycle import ChangeReason, ModelState
from loaderd.server.models.record import LoadOptions, ModelRecord, ModelView, is_model_id
from loaderd.server.store.names import HubName, LocalName, parse_name
from loaderd.server.supervisor.worker import Worker

logger = logging.getLogger(__name__)

R = TypeVar("R")

_MAX_FAILED = 16
_LIMIT_RETRY_S = 30


class ModelRegistry:
    """All models of the daemon.

    Args:
        max_requests: Most generation requests that one replica takes, running and waiting.
        keep_alive_s: How long models stay that nobody uses, unless a client says otherwise.

    Attributes:
        events: Every change of a model's state.
        changed: Set at every change of state or name, and when draining begins; for one reader,
            who clears it.
        on_death: Called with a model that a worker's death has left with fewer replicas than
            are wanted, or with none.
        leases: What holds models between calls.
        use_changed: Set when some model's expiry may have changed; for one reader, who clears it.
        max_requests: As given; may be set at any time.
        keep_alive_s: As given; may be set at any time, for models that come from then on.
    """

    def __init__(self, max_requests: int, keep_alive_s: float = PINNED) -> None:
        self.events = EventBus()
        self.changed = asyncio.Event()
        self.use_changed = asyncio.Event()
        self.on_death: Callable[[ModelRecord], None] | None = None
        self.max_requests = max_requests
        self.keep_alive_s = keep_alive_s
        self.leases = Leases(time.monotonic, self.use_changed.set, self._lease_ended)
        self._records: dict[str, ModelRecord] = {}
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._active_requests = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    def views(self) -> list[ModelView]:
        """All models as they are now, oldest first."""
        return [self.view(record) for record in self._records.values()]

    def view(self, record: ModelRecord) -> ModelView:
        """A model as it is now."""
        expiry = self.expiry(record)
        leases = len(self.leases.of(record.id))
        return record.view(leases, None if expiry == math.inf else expiry)

    def records(self) -> list[ModelRecord]:
        """All models, oldest first."""
        return list(self._records.values())

    def expiry(self, record: ModelRecord) -> float:
        """Monotonic time at which it is to go; infinity if it is in use, pinned or not READY."""
        is_used = record.active_requests or record.replicas.growing.locked()
        if record.state is not ModelState.READY or is_used:
            return math.inf
        leases = self.leases.of(record.id)
        if leases:  # its time begins when the last one ends
            return max(lease.expires for lease in leases) + record.keep_alive.seconds
        return record.keep_alive.expiry()

    def find(self, text: str) -> ModelRecord:
        """The model that a request names by id or name.

        Raises:
            InvalidNameError: It is no name.
            InvalidArgumentError: Several models have it.
            ModelNotLoadedError: None has it.
        """
        if record := self._records.get(text):
            return record
        if is_model_id(text):
            raise ModelNotLoadedError(model=text)
        name = parse_name(text)
        named = [record for record in self._records.values() if record.is_named(name)]
        # A load of the same name must not disturb who uses the model that is there.
        found = (
            [record for record in named if record.state is ModelState.READY]
            or [record for record in named if record.state.is_loading]
            or [record for record in named if record.state is ModelState.UNLOADING]
            or named[-1:]
        )
        if not found:
            raise ModelNotLoadedError(model=text)
        if len(found) > 1:
            ids = ", ".join(record.id for record in found)
            raise InvalidArgumentError("model", f"several models have this name; use an id: {ids}")
        return found[0]

    def known(self, text: str) -> ModelRecord | None:
        """As `find`, but None where there is none.

        Raises:
            InvalidNameError, InvalidArgumentError: As `find`.
        """
        try:
            return self.find(text)
        except ModelNotLoadedError:
            return None

    def check_serves(self, record: ModelRecord) -> None:
        """Checks that a model takes requests.

        Raises:
            DrainingError: The daemon is shutting down.
            ModelNotLoadedError: The model is not READY.
        """
        self.check_open()
        if record.state is not ModelState.READY:
            raise ModelNotLoadedError(model=str(record.name))

    def held(self, identity: str, options: LoadOptions) -> ModelRecord | None:
        """The model of these files and options that is loaded, loading or unloading."""
        same = self._same(identity, options)
        return next((record for record in same if record.state.is_held), None)

    def failed(self, identity: str, options: LoadOptions) -> ModelRecord | None:
        """The model of these files and options that has failed; it can be loaded again."""
        same = self._same(identity, options)
        return next((record for record in same if record.state is ModelState.FAILED), None)

    def add(
        self, name: HubName | LocalName, options: LoadOptions, caller: Caller | None = None
    ) -> ModelRecord:
        """A new model, RESOLVING; it replaces one of the same name and options that failed.

        Args:
            name: What it was asked for by.
            options: How it is loaded.
            caller: Who asks for it; None: the daemon itself.

        Raises:
            DrainingError: The daemon is shutting down.
            ClientLimitError: The caller has loaded too many.
        """
        self.check_open()
        self._check_limit(caller)
        failed = [each for each in self._records.values() if each.state is ModelState.FAILED]
        for stale in failed:
            if stale.is_named(name) and stale.options == options:
                self.forget(stale)
        record = ModelRecord(name, options, KeepAlive(self.keep_alive_s, time.monotonic))
        record.loaded_for = caller.name if caller is not None else ""
        self._records[record.id] = record
        self._publish(record, None)
        return record

    def give(self, record: ModelRecord, caller: Caller | None) -> None:
        """Makes a model that had failed that of who loads it again; None leaves it as it is.

        Raises:
            ClientLimitError: The caller has loaded too many.
        """
        if caller is not None:
            self._check_limit(caller)
            record.loaded_for = caller.name

    def name(self, record: ModelRecord, name: HubName | LocalName) -> None:
        """Lets requests call a model by `name`, unless it is gone by now.

        A branch that moved means the newest of the models that were loaded by its name.
        """
        if record.state is not ModelState.READY:
            return
        record.aliases.add(name)
        for other in self._records.values():
            if other is not record and other.options == record.options:
                other.aliases.discard(name)
        self.changed.set()

    def to(
        self, record: ModelRecord, state: ModelState, failure: LoaderdError | None = None
    ) -> None:
        """Moves a model to `state` and tells all watchers; the only writer of state."""
        previous = record.lifecycle.to(state)
        record.failure = failure
        if state is ModelState.READY:
            record.ready_at = datetime.now(UTC)
            record.keep_alive.ready()
            self.use_changed.set()
        elif state is ModelState.UNLOADED:
            del self._records[record.id]
            self.leases.drop(record.id)
            record.gone.set()
        if state in {ModelState.UNLOADED, ModelState.FAILED}:
            record.unpin()
        if failure is None:
            logger.info(
                "%s %s: %s", record.id, record.name, state.value, extra={"model": record.name}
            )
        else:
            logger.warning(
                "%s %s: %s: %s",
                record.id,
                record.name,
                state.value,
                failure,
                extra={"model": record.name},
            )
        self._publish(record, previous)
        if state is ModelState.FAILED:
            self._forget_old_failures()

    def forget(self, record: ModelRecord) -> None:
        """Removes a model that has failed from the list."""
        record.leaving = ChangeReason.FORGOTTEN
        self.to(record, ModelState.UNLOADED)

    def resized(self, record: ModelRecord, reason: ChangeReason = ChangeReason.REPLICAS) -> None:
        """Tells all watchers that a READY model has more or fewer replicas now, and why."""
        serving = record.replicas.serving
        record.details = serving[0].details
        logger.info(
            "%s %s: %d of %d replicas serve",
            record.id,
            record.name,
            len(serving),
            record.replicas.wanted,
        )
        self.events.publish(datetime.now(UTC), record.state, self.view(record), reason, None)
        self.changed.set()

    @contextmanager
    def use(
        self,
        text: str,
        keep_alive_s: float | None = None,
        lease_id: str | None = None,
        asker: str = "",
    ) -> Iterator[tuple[str, Worker]]:
        """Counts a request on a READY model while it runs.

        Args:
            text: The model.
            keep_alive_s: Its keep-alive from now on; None for the one that it has.
            lease_id: A lease on it, which is renewed by it; None for none.
            asker: Whose prompts have their beginnings in common; empty if unknown.

        Yields:
            The model's id and its worker with the fewest requests.

        Raises:
            LoaderdError: As `find`, and QueueFullError, DrainingError, LeaseNotFoundError.
        """
        record = self.find(text)
        self.check_serves(record)
        replica = record.replicas.least_loaded(asker)
        with nullcontext() if lease_id is None else self.leases.use(lease_id, record.id):
            if replica.requests >= self.max_requests:
                raise QueueFullError(model=str(record.name), limit=self.max_requests)
            if keep_alive_s is not None:
                record.keep_alive.seconds = keep_alive_s
            self._count(record, 1)
            try:
                with record.replicas.use(replica, asker) as worker:
                    yield record.id, worker
            finally:
                self._count(record, -1)

    def keep(self, record: ModelRecord, seconds: float) -> None:
        """Sets a model's keep-alive."""
        record.keep_alive.seconds = seconds
        self.use_changed.set()

    async def unload(self, text: str, force: bool, grace_s: float = 0.0) -> tuple[ModelView, int]:
        """Ends a model. Cancelling the call does not stop what has begun.

        Args:
            text: The model.
            force: Whether to end what uses it.
            grace_s: How long that may go on before.

        Returns:
            The model, UNLOADED, and the bytes that its processes held.

        Raises:
            LoaderdError: As `find`, and ModelInUseError.
        """
        record = self.find(text)
        if record.state is ModelState.UNLOADING:
            return await self._cut(record, text, force, grace_s)
        leases = len(self.leases.of(record.id))
        if not force and (record.active_requests or leases or record.state.is_loading):
            raise ModelInUseError(text, record.active_requests, leases)
        ending = self.end(record, ChangeReason.UNLOAD, grace_s, by_force=force)
        freed = await asyncio.shield(ending)
        return self.view(record), freed

    async def _cut(
        self, record: ModelRecord, text: str, force: bool, grace_s: float
    ) -> tuple[ModelView, int]:
        """Shortens the grace of a model that is being unloaded, and waits for its end."""
        if not force:
            raise ModelNotLoadedError(model=text)
        asyncio.get_running_loop().call_later(grace_s, record.quiet.set)
        await record.gone.wait()
        return self.view(record), record.freed_bytes

    @property
    def active_requests(self) -> int:
        """Requests on models that run or wait."""
        return self._active_requests

    @property
    def draining(self) -> bool:
        """Whether new work is refused because the daemon is shutting down."""
        return self._draining

    def check_open(self) -> None:
        """Raises DrainingError when the daemon is shutting down."""
        if self._draining:
            raise DrainingError

    async def drain(self, patience_s: float) -> None:
        """Refuses new work, stops loads, and waits for running requests, at most `patience_s`."""
        self._draining = True
        self.changed.set()
        self.events.end(DrainingError())
        loading = [record for record in self._records.values() if record.state.is_loading]
        for record in self._records.values():
            if record.state.is_loading or record.replicas.growing.locked():
                record.abort(DrainingError())
        try:
            async with asyncio.timeout(patience_s):
                await self._idle.wait()
                await asyncio.gather(*(record.gone.wait() for record in loading))
        except TimeoutError:
            logger.warning("cutting %d requests that still run", self._active_requests)

    async def close(self) -> None:
        """Ends all models; requests that still run end with DrainingError."""
        for record in list(self._records.values()):
            record.quiet.set()
            for replica in record.replicas.all:
                replica.worker.link.fail(DrainingError())
        await asyncio.gather(
            *(self.end(record, ChangeReason.SHUTDOWN) for record in list(self._records.values()))
        )

    def check_replicas(self, record: ModelRecord, replicas: int, caller: Caller | None) -> None:
        """Checks that a client may have so many replicas of a model beside its other models.

        Raises:
            ClientLimitError: It may not; each replica counts as a model.
        """
        self._check_limit(caller, replicas, record)

    def _check_limit(
        self, caller: Caller | None, more: int = 1, record: ModelRecord | None = None
    ) -> None:
        most = caller.limits.models if caller is not None else None
        if caller is None or most is None:
            return
        records = self._records.values()
        own = [each for each in records if each.loaded_for == caller.name and each.state.is_held]
        if sum(each.replicas.wanted for each in own if each is not record) + more > most:
            raise ClientLimitError(caller.name, "models", most, _LIMIT_RETRY_S)

    def _same(self, identity: str, options: LoadOptions) -> list[ModelRecord]:
        """All models of these files and options."""
        key = (identity, options)
        return [each for each in self._records.values() if (each.identity, each.options) == key]

    def _lease_ended(self, model_id: str, when: float) -> None:
        if record := self._records.get(model_id):
            record.keep_alive.held(when)

    def end(
        self,
        record: ModelRecord,
        reason: ChangeReason,
        grace_s: float = 0.0,
        *,
        by_force: bool = False,
    ) -> asyncio.Task[int]:
        """Begins to end a model; no request is taken any more when this returns.

        Args:
            record: The model.
            reason: Why.
            grace_s: How long its requests may go on before.
            by_force: Whether those who use it, or wait for its load, are to be told so.

        Returns:
            A task whose result is the bytes that its processes held.
        """
        kind = ModelUnloadedError if by_force else ModelNotLoadedError
        error = kind(model=str(record.name))
        record.leaving = reason
        if record.state is ModelState.READY:
            if record.replicas.growing.locked():
                record.abort(error)
            self.to(record, ModelState.UNLOADING)
            workers = [replica.worker for replica in record.replicas.all]
            return self._spawn(self._close(record, workers, error, grace_s))
        if record.state.is_loading:
            record.abort(error)
        elif record.state is ModelState.FAILED:
            self.to(record, ModelState.UNLOADED)
        return self._spawn(self._gone(record))

    async def _close(
        self, record: ModelRecord, workers: list[Worker], error: LoaderdError, grace_s: float
    ) -> int:
        try:
            async with asyncio.timeout(grace_s):
                await record.quiet.wait()
        except TimeoutError:
            pass  # what runs still is ended
        await asyncio.gather(*(worker.close(error) for worker in workers))
        record.freed_bytes = sum(worker.link.memory_bytes for worker in workers)
        async with record.replicas.growing:  # replicas that were being started have ended too
            self.to(record, ModelState.UNLOADED)
        return record.freed_bytes

    async def _gone(self, record: ModelRecord) -> int:
        await record.gone.wait()
        return 0

    def _forget_old_failures(self) -> None:
        failed = [each for each in self._records.values() if each.state is ModelState.FAILED]
        failed.sort(key=lambda each: each.lifecycle.entered[ModelState.FAILED])
        for record in failed[:-_MAX_FAILED]:
            self.forget(record)

    def _count(self, record: ModelRecord, change: int) -> None:
        record.count(change)
        self.use_changed.set()
        self._active_requests += change
        if self._active_requests:
            self._idle.clear()
        else:
            self._idle.set()

    def _publish(self, record: ModelRecord, previous: ModelState | None) -> None:
        self.events.publish(
            datetime.now(UTC),
            previous,
            self.view(record),
            record.change_reason,
            record.lifecycle.previous_s,
        )
        self.changed.set()

    def _spawn(self, work: Coroutine[None, None, R]) -> asyncio.Task[R]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
