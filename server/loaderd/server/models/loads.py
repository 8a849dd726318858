"""From a name to a model that answers: resolve, download, load."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial

from loaderd.server.access.caller import OWNER, Caller
from loaderd.server.access.roles import Role
from loaderd.server.errors import (
    ClientLimitError,
    DeviceMemoryError,
    ForbiddenError,
    InternalError,
    InvalidArgumentError,
    LoaderdError,
    ModelNotLoadedError,
    UnsupportedOptionError,
)
from loaderd.server.models.lifecycle import ChangeReason, ModelState
from loaderd.server.models.planner import Planner
from loaderd.server.models.record import LoadOptions, ModelRecord, identity_of, is_model_id
from loaderd.server.models.registry import ModelRegistry
from loaderd.server.models.scaling import Scaling
from loaderd.server.single_flight import Publish, SingleFlight
from loaderd.server.store.names import HubName, LocalName, parse_name
from loaderd.server.store.resolve import CachedSnapshot, LocalFolder, NotCached
from loaderd.server.store.store import DownloadProgress, ModelStore
from loaderd.server.store.verifications import Proving
from loaderd.server.store.verify import VerifyProgress
from loaderd.server.supervisor.supervisor import Supervisor
from loaderd.server.tracing import names
from loaderd.server.tracing.spans import annotate, stage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadProgress:
    """What a load is doing.

    Attributes:
        model_id: The record's id.
        state: RESOLVING, DOWNLOADING or LOADING.
        download: How far the download is, while DOWNLOADING.
        elapsed_s: Seconds since the load began.
        verification: How far the reading of files is that nobody has hashed yet.
    """

    model_id: str
    state: ModelState
    download: DownloadProgress | None
    elapsed_s: float
    verification: VerifyProgress | None = None


class OnDemand(Enum):
    """Which models a request for text may load."""

    OFF = "off"
    CACHED = "cached"
    ANY = "any"


@dataclass(frozen=True)
class _Wish:
    """What somebody asks for."""

    name: HubName | LocalName
    options: LoadOptions
    caller: Caller | None
    replicas: int | None = None


class Loads:
    """Loads models; all who ask for one model at the same time share one load.

    Args:
        registry: Where the models are kept.
        store: Where their files are.
        supervisor: Where their workers come from.
        planner: Says whether they fit.
        on_demand: Which models `ensure` loads.
        user_loads: Which models clients with the role of a user load.

    Attributes:
        on_demand: As given; may be set at any time.
        user_loads: As given; may be set at any time.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        store: ModelStore,
        supervisor: Supervisor,
        planner: Planner,
        on_demand: OnDemand,
        *,
        user_loads: OnDemand = OnDemand.ANY,
    ) -> None:
        self._registry = registry
        self._store = store
        self._planner = planner
        self._scaling = Scaling(registry, supervisor, planner, store)
        self.on_demand = on_demand
        self.user_loads = user_loads
        self._flights: SingleFlight[tuple[str, LoadOptions], LoadProgress, ModelRecord] = (
            SingleFlight("load")
        )
        self._fetches: SingleFlight[tuple[str, LoadOptions], LoadProgress, ModelRecord] = (
            SingleFlight("fetch")
        )
        self._scalings: SingleFlight[tuple[str, int | None], LoadProgress, ModelRecord] = (
            SingleFlight("scale")
        )

    async def load(
        self,
        text: str,
        options: LoadOptions,
        caller: Caller = OWNER,
        replicas: int | None = None,
    ) -> AsyncGenerator[LoadProgress | ModelRecord, None]:
        """Joins the model's load, or starts it; a model that is READY is there at once.

        Closing the generator early stops the load, unless others wait for it.

        Args:
            text: The model.
            options: How to load it.
            caller: Who asks for it.
            replicas: How many of it there are to be from now on; None: as many as there are, 1
                of a model that is new.

        Yields:
            Progress, and the model, READY with its replicas, at the end.

        Raises:
            ForbiddenError: The caller may not.
            ClientLimitError: The caller has loaded too many.
            LoaderdError: The name is invalid, or its files cannot be used.
        """
        self._registry.check_open()
        name = parse_name(text)
        await self._check_user(caller, name, options)
        await self._planner.check(text, options)
        async with aclosing(self._scaled(_Wish(name, options, caller, replicas))) as updates:
            async for update in updates:
                if isinstance(update, ModelRecord):
                    self._registry.name(update, name)
                    update.keep_alive.given()
                yield update

    async def ensure(self, text: str, caller: Caller = OWNER) -> None:
        """Loads the model that a request names, unless it is READY, as far as that is allowed.

        It is READY when this returns; nobody unloads it before the caller's next await.

        Args:
            text: The model.
            caller: Who asks.

        Raises:
            LoaderdError: As `load`, and ModelNotLoadedError: it may not be loaded. A load that has
                just failed is not tried again for a while: its error tells the others too.
        """
        while True:
            known = self._registry.known(text)
            if known is not None and known.state is ModelState.READY:
                return
            if self.on_demand is OnDemand.OFF or _is_gone(known, text):
                raise ModelNotLoadedError(model=text)
            if known is None:
                await self._check_may_load(text, parse_name(text))
                await outcome(self.load(text, LoadOptions(), caller))
                continue
            if known.failure is not None and time.monotonic() < known.rests_until:
                raise known.failure.with_traceback(None)
            if not known.state.is_loading:
                await self._check_may_load(text, known.exact_name)
                await self._check_user(caller, known.exact_name, known.options)
            loaded = await self.again(known, caller)
            if loaded is not known:  # other names of the same files came to be loaded
                if is_model_id(text):
                    raise ModelNotLoadedError(model=text)
                self._registry.name(loaded, parse_name(text))

    async def again(self, record: ModelRecord, caller: Caller | None = None) -> ModelRecord:
        """Loads a model of which the registry knows, with its options, or joins its load.

        A model that is READY gets the replicas that it is missing.

        Args:
            record: The model.
            caller: Who asks for it; None leaves it to whose it was.

        Returns:
            The model, READY; another one, if that has the same files and options.

        Raises:
            LoaderdError: As `load`.
        """
        self._registry.check_open()
        if record.state is ModelState.READY:
            return await outcome(self._scale(record, None))
        return await outcome(self._updates(_Wish(record.exact_name, record.options, caller)))

    async def _check_may_load(self, text: str, name: HubName | LocalName) -> None:
        if self.on_demand is OnDemand.CACHED:
            files = await self._store.resolve(name)
            if isinstance(files, NotCached):
                raise ModelNotLoadedError(model=text)

    async def _check_user(
        self, caller: Caller, name: HubName | LocalName, options: LoadOptions
    ) -> None:
        """Refuses what the operator does not let users load."""
        if caller.role is not Role.USER or self.user_loads is OnDemand.ANY:
            return
        files = await self._store.resolve(name)
        if isinstance(files, NotCached):
            raise ForbiddenError(caller.shown, caller.role, "download models")
        if self.user_loads is OnDemand.OFF:
            held = self._registry.held(identity_of(files), options)
            if held is None or held.state is ModelState.UNLOADING:
                raise ForbiddenError(caller.shown, caller.role, "load models")

    async def _scaled(self, wish: _Wish) -> AsyncGenerator[LoadProgress | ModelRecord, None]:
        """A load, and then what it takes until there are as many replicas as are wished."""
        async with aclosing(self._updates(wish)) as updates:
            async for update in updates:
                if not isinstance(update, ModelRecord) or update.replicas.are(wish.replicas):
                    yield update
                    continue
                self._check_may_scale(wish, update)
                async with aclosing(self._scale(update, wish.replicas)) as steps:
                    async for step in steps:
                        yield step

    def _check_may_scale(self, wish: _Wish, record: ModelRecord) -> None:
        """Refuses users the models of others, and more than their limit."""
        caller = wish.caller
        if caller is None or wish.replicas is None:
            return
        is_own = bool(caller.name) and record.loaded_for == caller.name
        if caller.role is Role.USER and not is_own:
            raise ForbiddenError(caller.shown, caller.role, "scale models that others loaded")
        self._registry.check_replicas(record, wish.replicas, caller)

    async def _scale(
        self, record: ModelRecord, replicas: int | None
    ) -> AsyncGenerator[LoadProgress | ModelRecord, None]:
        """Gives a READY model so many replicas; None: those that it is missing."""

        async def work(publish: Publish[LoadProgress]) -> ModelRecord:
            if replicas is None or replicas > len(record.replicas.serving):
                publish(LoadProgress(record.id, ModelState.LOADING, None, 0.0))
            if replicas is None:
                await self._scaling.replenish(record)
            else:
                await self._scaling.scale(record, replicas)
            return record

        async with self._scalings.join((record.id, replicas), work) as flight:
            async for progress in flight.progress():
                yield progress
            yield await flight.result()

    async def _updates(self, wish: _Wish) -> AsyncGenerator[LoadProgress | ModelRecord, None]:
        while True:
            with stage("resolve"):
                files = await self._store.resolve(wish.name)
            if isinstance(files, NotCached):
                # The commit is not known yet: one load of this name and revision, until it is.
                key = f"{files.name.repo_id}@{files.name.revision}"
                work = partial(self._fetch, files.name, wish)
                flights = self._fetches
            else:
                key = identity_of(files)
                work = partial(self._load, wish, files, None)
                flights = self._flights
            try:
                async with flights.join((key, wish.options), work) as flight:
                    async for progress in flight.progress():
                        yield progress
                    yield await flight.result()
                return
            except ClientLimitError as error:
                # Somebody else's load, which was refused: this caller's own begins.
                if wish.caller is not None and error.client == wish.caller.name:
                    raise

    async def _fetch(
        self, name: HubName, wish: _Wish, publish: Publish[LoadProgress]
    ) -> ModelRecord:
        """Downloads, then joins the load of the commit that came."""
        annotate({names.MODEL: str(name)})
        record = self._registry.add(name, wish.options, wish.caller)
        record.load_task = asyncio.current_task()
        with self._settled(record):
            self._registry.check_replicas(record, wish.replicas or 1, wish.caller)
            files = await self._download(name, record, publish)
            work = partial(self._load, replace(wish, name=name), files, record)
            async with self._flights.join((identity_of(files), wish.options), work) as flight:
                async for progress in flight.progress():
                    publish(progress)
                loaded = await flight.result()
            if loaded is not record:  # another name of the same commit was faster
                self._registry.to(record, ModelState.UNLOADED)
            return loaded

    async def _download(
        self, name: HubName, record: ModelRecord, publish: Publish[LoadProgress]
    ) -> CachedSnapshot:
        publish(_progress(record, None))
        async with self._store.download(name) as download:
            async for state in download.progress():
                if record.state is ModelState.RESOLVING and state.progress.total_bytes:
                    self._registry.to(record, ModelState.DOWNLOADING)
                publish(_progress(record, state.progress if state.progress.total_bytes else None))
            snapshot: CachedSnapshot = await download.result()
            return snapshot

    async def _load(
        self,
        wish: _Wish,
        files: LocalFolder | CachedSnapshot,
        record: ModelRecord | None,
        publish: Publish[LoadProgress],
    ) -> ModelRecord:
        """Loads files that are there, in workers of their own.

        A model that had failed has the replicas that can be loaded, unless somebody asks for some.
        """
        identity, options = identity_of(files), wish.options
        held = self._registry.held(identity, options)
        if held is not None and held.state is ModelState.UNLOADING:
            await held.gone.wait()
        elif held is not None and held.state is ModelState.READY:
            annotate(held.span_attributes)
            return held
        if record is None:
            record = self._registry.failed(identity, options)
            if record is not None:
                self._registry.give(record, wish.caller)
        if record is None:
            record = self._registry.add(wish.name, options, wish.caller)
        record.load_task = asyncio.current_task()
        with self._settled(record):
            self._registry.check_replicas(record, wish.replicas or 1, wish.caller)
            record.found(files)
            annotate(record.span_attributes)
            record.earlier_failure = record.failure
            self._registry.to(record, ModelState.LOADING)
            if isinstance(files, CachedSnapshot):
                record.pin = await self._store.hold(files, record.id)
            publish(_progress(record, None))
            if isinstance(files, CachedSnapshot):
                with record.timing("verify"):
                    await self._store.prove(files, lambda update: publish(_proving(record, update)))
                publish(_progress(record, None))
            wanted = wish.replicas or record.replicas.wanted
            await self._scaling.load(record, wanted, least=wish.replicas or 1)
            return record

    @contextmanager
    def _settled(self, record: ModelRecord) -> Iterator[None]:
        """Gives a load that ends early its last state, and its waiters the reason."""
        try:
            yield
        except asyncio.CancelledError:
            # A load that was handed on to another task goes on there, for others who wait.
            if record.state.is_loading and record.load_task is asyncio.current_task():
                self._give_up(record)
            if record.abort_error is not None:
                raise record.abort_error from None
            raise
        except LoaderdError as error:
            self._fail(record, error)
            raise
        except Exception as error:
            incident = secrets.token_hex(4)
            logger.exception("load of %s failed, incident %s", record.id, incident)
            self._fail(record, InternalError(incident=incident))
            raise InternalError(incident=incident) from error

    def _give_up(self, record: ModelRecord) -> None:
        """Nobody waits any more: a model that had failed has failed again, others are gone."""
        if record.earlier_failure is not None and record.abort_error is None:
            self._registry.to(record, ModelState.FAILED, record.earlier_failure)
        else:
            self._registry.to(record, ModelState.UNLOADED)

    def _fail(self, record: ModelRecord, error: LoaderdError) -> None:
        if not record.state.is_loading:
            return
        is_kept = record.state is not ModelState.RESOLVING and not _is_refusal(record, error)
        self._registry.to(record, ModelState.FAILED, error)
        if not is_kept:  # watchers were told; what never was a load need not stay in the list
            self._registry.forget(record)


async def outcome(updates: AsyncGenerator[LoadProgress | ModelRecord, None]) -> ModelRecord:
    """Follows a load to its end; the model, READY.

    Raises:
        LoaderdError: As `Loads.load`.
    """
    async with aclosing(updates):
        async for update in updates:
            if isinstance(update, ModelRecord):
                return update
    raise RuntimeError("a load ends with its model or an error")


def _is_refusal(record: ModelRecord, error: LoaderdError) -> bool:
    """Whether a new model was not to be had like that: nothing of it has failed."""
    if record.earlier_failure is not None:
        return False  # it was there before, and is to come back
    if isinstance(error, DeviceMemoryError):
        return not record.has_begun  # the plan has refused it, not a device that was full
    return isinstance(error, InvalidArgumentError | UnsupportedOptionError)


def _is_gone(known: ModelRecord | None, text: str) -> bool:
    """Whether a request names what is not to be loaded for it."""
    if known is None or known.state is not ModelState.UNLOADING:
        return known is None and is_model_id(text)
    # Those who ask at once are refused while somebody unloads it, and an id means that one load.
    return is_model_id(text) or known.leaving is ChangeReason.UNLOAD


def _proving(record: ModelRecord, update: Proving) -> LoadProgress:
    if isinstance(update, VerifyProgress):
        return replace(_progress(record, None), verification=update)
    return _progress(record, update)


def _progress(record: ModelRecord, download: DownloadProgress | None) -> LoadProgress:
    elapsed = time.monotonic() - record.lifecycle.entered[ModelState.RESOLVING]
    return LoadProgress(record.id, record.state, download, elapsed)
