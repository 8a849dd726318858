"""What the daemon knows of one model."""

from __future__ import annotations

import asyncio
import math
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import Enum

from loaderd.server.errors import (
    DeviceMemoryError,
    InvalidArgumentError,
    LoaderdError,
    UnsupportedOptionError,
)
from loaderd.server.models.keep_alive import KeepAlive
from loaderd.server.models.lifecycle import ChangeReason, Lifecycle, ModelState
from loaderd.server.models.replicas import Replicas, ReplicaView
from loaderd.server.models.where import Where
from loaderd.server.store.names import HubName, LocalName
from loaderd.server.store.pins import Pin
from loaderd.server.store.resolve import CachedSnapshot, LocalFolder
from loaderd.server.supervisor.supervisor import LoadedWorker
from loaderd.server.tracing import names
from loaderd.server.tracing.spans import stage
from loaderd.v1 import model_pb2

_ID = re.compile(r"m:[0-9a-f]{12}")
_SHORTEST_REST_S = 5.0
_LONGEST_REST_S = 60.0


class ModelSource(Enum):
    """Where a model's files come from."""

    LOCAL = "local"
    CACHED = "cached"
    HUB = "hub"


@dataclass(frozen=True)
class LoadOptions:
    """How to load; part of a loaded model's key.

    Attributes:
        dtype: DTYPE_UNSPECIFIED is the policy's choice.
        quantization: QUANTIZATION_UNSPECIFIED is none.
        where: Where the layers may go.

    Raises:
        InvalidArgumentError: A value is out of bounds.
        UnsupportedOptionError: What is offloaded cannot be quantized.
    """

    dtype: model_pb2.Dtype.ValueType = model_pb2.DTYPE_UNSPECIFIED
    quantization: model_pb2.Quantization.ValueType = model_pb2.QUANTIZATION_UNSPECIFIED
    where: Where = field(default_factory=Where)

    def __post_init__(self) -> None:
        if self.dtype not in model_pb2.Dtype.values():
            raise InvalidArgumentError("options.dtype", f"there is no dtype number {self.dtype}")
        if self.quantization not in model_pb2.Quantization.values():
            problem = f"there is no quantization number {self.quantization}"
            raise InvalidArgumentError("options.quantization", problem)
        if self.quantization and self.where.may_offload:
            problem = "quantized weights cannot be offloaded"
            raise UnsupportedOptionError("options.quantization", problem)


@dataclass(frozen=True)
class LoadTimings:
    """Seconds that the steps of a load took; None for those not done."""

    resolve: float | None
    download: float | None
    verify: float | None
    placement: float | None
    worker: float | None
    weights: float | None
    engine: float | None
    total: float | None


@dataclass(frozen=True)
class ModelView:
    """A record as it is at one moment."""

    id: str
    name: str
    aliases: tuple[str, ...]
    source: ModelSource
    repo_id: str
    commit: str
    state: ModelState
    options: LoadOptions
    details: model_pb2.ModelDetails | None
    wanted_replicas: int
    replicas: tuple[ReplicaView, ...]
    active_requests: int
    created_at: datetime
    ready_at: datetime | None
    timings: LoadTimings
    failure: LoaderdError | None
    stale: bool
    keep_alive_s: float
    active_leases: int
    expires: float | None
    last_used: float | None
    statistics: model_pb2.ModelStatistics | None


class ModelRecord:
    """One model, from the request to load it until it is gone.

    Only the registry changes its state.

    Attributes:
        id: Unique; never a valid name of the hub's, since it has a colon.
        name: The name that it was asked for by.
        aliases: The names that requests may call it by.
        files: Which files it is; None while that is not known.
        identity: Real path or repository and commit; empty while the commit is not known.
        replicas: The workers that hold it, while it is READY or UNLOADING.
        details: What its workers found.
        active_requests: Generation requests that run or wait.
        quiet: Set while there are none, or nobody waits for their end any more.
        abort_error: What `abort` was called with first.
        load_task: The task that loads it, or more replicas of it.
        gone: Set when it is UNLOADED.
        pin: What keeps its snapshot from being deleted while it is held.
        stale: The hub did not answer when it was to be downloaded.
        keep_alive: When it was used, and how long it stays without being used.
        leaving: Why it is being ended, if it is.
        freed_bytes: What its processes held when they ended.
        earlier_failure: Why it had failed when it began to be loaded again.
        has_begun: Whether a worker was asked to load it, since its files were last found.
        loaded_for: The client that it was loaded for; empty for one without a name.
    """

    def __init__(
        self, name: HubName | LocalName, options: LoadOptions, keep_alive: KeepAlive
    ) -> None:
        self.id = f"m:{secrets.token_hex(6)}"
        self.name = name
        self.aliases = {name}
        self.options = options
        self.source = ModelSource.LOCAL if isinstance(name, LocalName) else ModelSource.HUB
        self.files: LocalFolder | CachedSnapshot | None = None
        self.identity = ""
        self.commit = ""
        self.lifecycle = Lifecycle(time.monotonic)
        self.replicas = Replicas()
        self.details: model_pb2.ModelDetails | None = None
        self.failure: LoaderdError | None = None
        self.active_requests = 0
        self.quiet = asyncio.Event()
        self.quiet.set()
        self._steps: dict[str, float] = {}
        self.created_at = datetime.now(UTC)
        self.ready_at: datetime | None = None
        self.gone = asyncio.Event()
        self.pin: Pin | None = None
        self.stale = False
        self.abort_error: LoaderdError | None = None
        self.load_task: asyncio.Task[object] | None = None
        self.keep_alive = keep_alive
        self.leaving: ChangeReason | None = None
        self.freed_bytes = 0
        self.earlier_failure: LoaderdError | None = None
        self.has_begun = False
        self.loaded_for = ""

    @property
    def state(self) -> ModelState:
        """Where it is in its life."""
        return self.lifecycle.state

    @property
    def lacks_replicas(self) -> bool:
        """Whether workers have died that nobody has started again."""
        is_short = self.state is ModelState.READY and self.replicas.missing > 0
        return self.state is ModelState.FAILED or is_short

    @property
    def is_alive(self) -> bool:
        """Whether it is READY, and its workers have not all died in this moment."""
        serving = self.replicas.serving
        is_served = any(not replica.worker.link.failed for replica in serving)
        return self.state is ModelState.READY and is_served

    @property
    def change_reason(self) -> ChangeReason:
        """Why it has the state that it has."""
        if self.state is ModelState.FAILED:
            return ChangeReason.FAILURE
        if self.leaving is not None:
            return self.leaving
        # A load that ends so was left by all who waited, or led to a model that was there.
        is_over = self.state is ModelState.UNLOADED
        return ChangeReason.UNLOAD if is_over else ChangeReason.LOAD

    @property
    def exact_name(self) -> HubName | LocalName:
        """The name of its files, whatever its branch has come to mean; if that is known."""
        if isinstance(self.name, HubName) and self.commit:
            return replace(self.name, revision=self.commit)
        return self.name

    @property
    def span_attributes(self) -> dict[str, str]:
        """What spans say of it."""
        known = {names.MODEL: str(self.name), names.MODEL_ID: self.id, names.REVISION: self.commit}
        return {name: value for name, value in known.items() if value}

    @property
    def rests_until(self) -> float:
        """Monotonic time before which no request loads it again, since its load has just failed.

        At least half of the time it does not load. What a device lacks may be there in a moment.
        """
        entered = self.lifecycle.entered
        is_new = self.failure is not self.earlier_failure
        has_failed = self.state is ModelState.FAILED and ModelState.READY not in entered
        if not (has_failed and is_new) or isinstance(self.failure, DeviceMemoryError):
            return -math.inf
        took = entered[ModelState.FAILED] - entered[ModelState.RESOLVING]
        return entered[ModelState.FAILED] + min(max(took, _SHORTEST_REST_S), _LONGEST_REST_S)

    def found(self, files: LocalFolder | CachedSnapshot) -> None:
        """Notes which files it is, as the first thing of its load."""
        self._steps.clear()
        self.has_begun = False
        self.files = files
        self.identity = identity_of(files)
        if isinstance(files, CachedSnapshot):
            self.commit = files.commit
            self.stale = files.stale
            if self.lifecycle.state is ModelState.RESOLVING:
                self.source = ModelSource.CACHED

    def loaded_by(self, models: Sequence[LoadedWorker]) -> None:
        """Notes how long its workers took, which began together: the one that was ready last."""
        last = max(models, key=lambda model: model.wait_s + model.load_s)
        weights_s = last.loaded.weights.ToTimedelta().total_seconds()
        self._steps["worker"] = last.wait_s
        self._steps["weights"] = weights_s
        self._steps["engine"] = max(last.load_s - weights_s, 0.0)

    @contextmanager
    def timing(self, step: str) -> Iterator[None]:
        """Notes how long a step of its load takes, by the name that it has in `LoadTimings`."""
        begun = time.monotonic()
        try:
            with stage(step):
                yield
        finally:
            self._steps[step] = time.monotonic() - begun

    def count(self, change: int) -> None:
        """Notes that a request begins, 1, or ends, -1."""
        self.active_requests += change
        if self.active_requests:
            self.quiet.clear()
            return
        self.quiet.set()
        self.keep_alive.used()

    def is_named(self, name: HubName | LocalName) -> bool:
        """Whether a request by this name means this model."""
        if name in self.aliases:
            return True
        if isinstance(name, LocalName) or isinstance(self.name, LocalName):
            return isinstance(name, LocalName) and self.identity == str(name.path)
        return name.repo_id == self.name.repo_id and name.revision == self.commit

    def unpin(self) -> None:
        """Lets go of its snapshot; nothing happens when it holds none."""
        if self.pin is not None:
            self.pin.release()
            self.pin = None

    def abort(self, error: LoaderdError) -> None:
        """Stops its load, or that of more replicas.

        Whoever waits for it gets `error`, or that of an earlier abort.
        """
        if self.abort_error is None and self.load_task is not None:
            self.abort_error = error
            self.load_task.cancel()

    def view(self, active_leases: int, expires: float | None) -> ModelView:
        """The record as it is now.

        Args:
            active_leases: How many hold it.
            expires: Monotonic time of its end if nobody uses it; None for none.
        """
        ran = self.lifecycle.between
        return ModelView(
            id=self.id,
            name=str(self.name),
            aliases=tuple(sorted(map(str, self.aliases))),
            source=self.source,
            repo_id=self.name.repo_id if isinstance(self.name, HubName) else "",
            commit=self.commit,
            state=self.state,
            options=self.options,
            details=self.details,
            wanted_replicas=self.replicas.wanted,
            replicas=tuple(replica.view() for replica in self.replicas.all),
            active_requests=self.active_requests,
            created_at=self.created_at,
            ready_at=self.ready_at,
            timings=LoadTimings(
                resolve=ran(ModelState.RESOLVING, ModelState.DOWNLOADING, ModelState.LOADING),
                download=ran(ModelState.DOWNLOADING, ModelState.LOADING),
                verify=self._steps.get("verify"),
                placement=self._steps.get("placement"),
                worker=self._steps.get("worker"),
                weights=self._steps.get("weights"),
                engine=self._steps.get("engine"),
                total=ran(ModelState.RESOLVING, ModelState.READY),
            ),
            failure=self.failure,
            stale=self.stale,
            keep_alive_s=self.keep_alive.seconds,
            active_leases=active_leases,
            expires=expires,
            last_used=self.keep_alive.last_used,
            statistics=self.replicas.statistics() if self.state is ModelState.READY else None,
        )


def is_model_id(text: str) -> bool:
    """Whether a request's `model` is an id rather than a name."""
    return _ID.fullmatch(text) is not None


def identity_of(files: LocalFolder | CachedSnapshot) -> str:
    """What makes two requests mean the same files: the real path, or repository and commit."""
    if isinstance(files, LocalFolder):
        return str(files.path)
    return f"{files.repo_id}@{files.commit}"
