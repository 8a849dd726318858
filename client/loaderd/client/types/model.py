"""Models in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TypeAlias, overload

from loaderd.client.types.download import DownloadProgress
from loaderd.client.types.enums import (
    ChangeReason,
    Dtype,
    ModelSource,
    ModelState,
    Offload,
    Quantization,
)
from loaderd.client.types.verification import VerifyProgress


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The options that a model was loaded with, as asked."""

    dtype: Dtype | None
    """None: left to the daemon."""
    device_map: str | Mapping[str, str] | None = field(hash=False)
    """As a whole, or the device of each module. None: left to the daemon."""
    quantization: Quantization | None
    """None: none."""
    max_memory: Mapping[str, int] = field(hash=False)
    """Most bytes of the devices that have a bound."""
    offload: Offload | None
    """Where layers may go that do not fit. None: nowhere."""


@dataclass(frozen=True, kw_only=True)
class ModelDetails:
    """What the worker knows of the model that it loaded."""

    architecture: str
    """The class that serves it, for example "LlamaForCausalLM"."""
    dtype: Dtype
    """The dtype in use."""
    dtype_reason: str
    """Why this dtype."""
    engine: str
    """The engine that serves it."""
    engine_reason: str
    """Why this engine."""
    context_length: int | None
    """Most tokens that prompt and output may have together; None: no fixed limit."""
    parameter_count: int
    """Number of weights."""
    weight_bytes: int
    """Memory of the weights, in bytes."""
    device_map: Mapping[str, str] = field(hash=False)
    """Module name to device, for each layer and each weight that is in none; one entry with an
    empty name when it is all on one. "disk", and "cpu" beside accelerators, is offloaded."""
    has_chat_template: bool
    """Whether it takes `messages`."""
    supported_parameters: tuple[str, ...]
    """Generation parameters that its engine honours; others are refused."""
    worker_pid: int
    """The worker's process id on the daemon's box."""
    quantization: Quantization | None
    """How its weights were quantized at load; None: not."""
    quantization_reason: str
    """What quantized them, or in which form the files had them; empty when they are plain."""
    planned_bytes: int
    """What the plan before the load said that this replica would take."""
    memory_bytes: int
    """What the load did take, as its worker measured it."""
    offloaded_bytes: int
    """Of the weights, what is in main memory beside accelerators, or on the disk; 0: nothing."""


@dataclass(frozen=True, kw_only=True)
class LoadTimings:
    """How long the steps of a load took; None for a step that was not done.

    They follow each other. Replicas load beside each other: of worker, weights and engine it has
    those of the replica that was ready last.
    """

    resolve: timedelta | None
    """Looking for the files."""
    download: timedelta | None
    """Downloading."""
    verify: timedelta | None
    """Making sure that the files are what they should be; None for local folders."""
    placement: timedelta | None
    """Planning its memory, and waiting for models that went for it."""
    worker: timedelta | None
    """Waiting for a worker process, or for its turn; near zero with a warm standby."""
    weights: timedelta | None
    """Reading weights and tokenizer."""
    engine: timedelta | None
    """Finding the engine that can serve it, trying it, and warming it up."""
    total: timedelta | None
    """From the request to READY."""


@dataclass(frozen=True, kw_only=True)
class ModelFailure:
    """Why a model failed."""

    reason: str
    """As in `LoaderdError.reason`."""
    message: str
    """One sentence for people."""


@dataclass(frozen=True, kw_only=True)
class Replica:
    """One process that holds a model."""

    number: int
    """Unique in the model's life; those that come later have greater ones."""
    worker_pid: int
    """Its process id on the daemon's box."""
    devices: tuple[str, ...]
    """The devices that its layers are on."""
    running_requests: int
    """Requests that it works on."""
    queued_requests: int
    """Requests that wait for their turn on it."""
    memory_bytes: int
    """Memory that it held at its last heartbeat, in bytes."""
    leaving: bool
    """Whether it takes no more requests, and ends when those that it has are over."""
    ready_at: datetime
    """When it was loaded, in UTC."""


@dataclass(frozen=True, kw_only=True)
class ModelStatistics:
    """What a model's engine does now, and what it has done since it was loaded.

    The engine tells it when work begins and ends, and once a second between.
    """

    running_requests: int
    """Requests that are computed now."""
    queued_requests: int
    """Requests that wait for their turn."""
    prompt_tokens: int
    """Tokens of prompts that were taken, those found in the prefix cache included."""
    cached_prompt_tokens: int
    """Of these, those found in the prefix cache."""
    generated_tokens: int
    """Tokens that were generated, of all completions."""
    prompt_tokens_per_second: float
    """Over the last five seconds."""
    generated_tokens_per_second: float
    """Over the last five seconds."""
    kv_tokens: int
    """Tokens that running requests have memory for: prompts and the most that they may
    generate."""
    kv_capacity_tokens: int | None
    """Tokens that there is such memory for; None: the engine knows no bound."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A model that the daemon holds, or tried to."""

    id: str
    """Unique in the daemon's life. Usable wherever a model is named."""
    name: str
    """The name that it was loaded by."""
    source: ModelSource
    """Where its files come from."""
    repo_id: str | None
    """`org/name`; None for a local folder."""
    commit: str | None
    """40 hex digits; None for a local folder, or while it is not known."""
    state: ModelState
    """Where it is in its life."""
    options: LoadOptions
    """The options that it was loaded with."""
    details: ModelDetails | None
    """What the worker found, of several replicas the oldest; set from READY on."""
    active_requests: int
    """Generation requests that run or wait now."""
    created_at: datetime | None
    """When the load was asked for, in UTC."""
    ready_at: datetime | None
    """When it became READY, in UTC; None before."""
    timings: LoadTimings
    """How long the steps of its load took."""
    failure: ModelFailure | None
    """Why it FAILED; None otherwise."""
    stale: bool
    """Whether its load had to download, the hub did not answer, and this is what the cache had: it
    may be older than what the revision is now."""
    keep_alive: timedelta
    """How long it stays loaded while nobody uses it; negative: it is pinned."""
    expires_at: datetime | None
    """When it will be unloaded if nobody uses it until then, in UTC; None while it is used, pinned
    or not READY."""
    active_leases: int
    """Leases that hold it now."""
    last_used_at: datetime | None
    """When the last request on it ended, or it became READY, in UTC; None before."""
    statistics: ModelStatistics | None
    """What its engine did until it was asked; None while it is not READY."""
    wanted_replicas: int
    """How many replicas there are to be."""
    replicas: tuple[Replica, ...]
    """Those that there are, oldest first."""


@dataclass(frozen=True, kw_only=True)
class LeaseInfo:
    """What the daemon last told of a lease."""

    id: str
    """What requests name it by."""
    model_id: str
    """The id of the model that it holds."""
    ttl: timedelta
    """How long it lives after its last renewal."""
    expires_at: datetime
    """When it ends unless it is renewed, in UTC."""


@dataclass(frozen=True, kw_only=True)
class LoadProgress:
    """What a load is doing now."""

    model_id: str
    """The loading model's id."""
    state: ModelState
    """RESOLVING, DOWNLOADING or LOADING."""
    download: DownloadProgress | None
    """Set while DOWNLOADING."""
    verification: VerifyProgress | None
    """Set while LOADING compares files with their hashes, which it does once for files that
    changed or that other programs brought."""
    elapsed: timedelta
    """Since the load began."""


@dataclass(frozen=True, kw_only=True)
class UnloadResult:
    """What an unload gave back."""

    model: ModelInfo
    """The model as it was, now UNLOADED."""
    freed_bytes: int
    """Memory that its process held: resident, and on accelerators; 0 when it was not READY."""


@dataclass(frozen=True)
class ModelList(Sequence[ModelInfo]):
    """All models of the daemon at one moment, oldest first; the first item of a watch."""

    models: tuple[ModelInfo, ...]

    @overload
    def __getitem__(self, index: int) -> ModelInfo: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ModelInfo, ...]: ...
    def __getitem__(self, index: int | slice) -> ModelInfo | tuple[ModelInfo, ...]:
        return self.models[index]

    def __len__(self) -> int:
        return len(self.models)

    def __iter__(self) -> Iterator[ModelInfo]:
        return iter(self.models)


@dataclass(frozen=True, kw_only=True)
class ModelEvent:
    """One change of a model's state."""

    sequence: int
    """Grows by one with each event of the daemon's life."""
    time: datetime
    """When it happened, in UTC."""
    previous_state: ModelState
    """The state before; UNSPECIFIED for a model's first event."""
    model: ModelInfo
    """The model after the change."""
    reason: ChangeReason
    """Why it changed."""
    previous_duration: timedelta | None
    """How long it had been in the state before; None for a model's first event."""


WatchUpdate: TypeAlias = ModelList | ModelEvent
"""An item of a watch: the list once, first; then events."""
