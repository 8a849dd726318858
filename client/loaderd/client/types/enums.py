"""Enumerations. Their values are those of loaderd.v1."""

from __future__ import annotations

from enum import IntEnum
from typing import Literal, TypeAlias

from grpc_health.v1 import health_pb2

from loaderd.v1 import cache_pb2, generation_pb2, model_pb2, system_pb2


class ModelState(IntEnum):
    """Where a model is in its life."""

    UNSPECIFIED = model_pb2.MODEL_STATE_UNSPECIFIED
    """No state yet, or one that this release does not know."""
    RESOLVING = model_pb2.MODEL_STATE_RESOLVING
    """Its files are being looked for."""
    DOWNLOADING = model_pb2.MODEL_STATE_DOWNLOADING
    """Files are coming from the hub."""
    LOADING = model_pb2.MODEL_STATE_LOADING
    """A worker process is reading the weights."""
    READY = model_pb2.MODEL_STATE_READY
    """It answers requests."""
    UNLOADING = model_pb2.MODEL_STATE_UNLOADING
    """Its process is ending."""
    UNLOADED = model_pb2.MODEL_STATE_UNLOADED
    """Gone. Seen in events only."""
    FAILED = model_pb2.MODEL_STATE_FAILED
    """It could not be loaded, or its worker ended."""


class ChangeReason(IntEnum):
    """Why a model changed its state."""

    UNSPECIFIED = model_pb2.CHANGE_REASON_UNSPECIFIED
    """One that this release does not know."""
    LOAD = model_pb2.CHANGE_REASON_LOAD
    """A step of its load."""
    UNLOAD = model_pb2.CHANGE_REASON_UNLOAD
    """A client unloaded it, or nobody waits for its load any more."""
    IDLE = model_pb2.CHANGE_REASON_IDLE
    """Nobody used it for as long as its keep-alive."""
    EVICTED = model_pb2.CHANGE_REASON_EVICTED
    """Another model needed its memory."""
    FAILURE = model_pb2.CHANGE_REASON_FAILURE
    """It failed; see `ModelInfo.failure`."""
    FORGOTTEN = model_pb2.CHANGE_REASON_FORGOTTEN
    """It had failed, and is loaded again, or too many have failed."""
    SHUTDOWN = model_pb2.CHANGE_REASON_SHUTDOWN
    """The daemon shuts down."""
    REPLICAS = model_pb2.CHANGE_REASON_REPLICAS
    """It has more or fewer replicas, and is READY as before."""
    WORKER_DIED = model_pb2.CHANGE_REASON_WORKER_DIED
    """One of its replicas died; others serve, and it is READY as before."""


class Dtype(IntEnum):
    """The number type of a model's weights and computation."""

    UNSPECIFIED = model_pb2.DTYPE_UNSPECIFIED
    """The daemon chooses: float16 on accelerators, what computes fastest on a CPU."""
    FLOAT16 = model_pb2.DTYPE_FLOAT16
    """IEEE 754 half precision."""
    BFLOAT16 = model_pb2.DTYPE_BFLOAT16
    """bfloat16."""
    FLOAT32 = model_pb2.DTYPE_FLOAT32
    """IEEE 754 single precision."""


DtypeName: TypeAlias = Literal["float16", "bfloat16", "float32"]
"""The names that are accepted where a `Dtype` is."""


class Quantization(IntEnum):
    """How a model's weights are kept in less memory than their dtype takes."""

    UNSPECIFIED = model_pb2.QUANTIZATION_UNSPECIFIED
    """As the files have them, or in a way that this release does not know."""
    INT8 = model_pb2.QUANTIZATION_INT8
    """Weights of linear layers as 8-bit integers."""
    INT4 = model_pb2.QUANTIZATION_INT4
    """Weights of linear layers as 4-bit integers."""
    NF4 = model_pb2.QUANTIZATION_NF4
    """Weights of linear layers as 4-bit NormalFloat."""


QuantizationName: TypeAlias = Literal["int8", "int4", "nf4"]
"""The names that are accepted where a `Quantization` is."""


class Offload(IntEnum):
    """Where layers may go for which the devices have no room."""

    UNSPECIFIED = model_pb2.OFFLOAD_UNSPECIFIED
    """Nowhere, or to a place that this release does not know."""
    CPU = model_pb2.OFFLOAD_CPU
    """To main memory."""
    DISK = model_pb2.OFFLOAD_DISK
    """To main memory as far as there is room, then to the disk."""


OffloadName: TypeAlias = Literal["cpu", "disk"]
"""The names that are accepted where an `Offload` is."""


class ModelSource(IntEnum):
    """Where a model's files come from."""

    UNSPECIFIED = model_pb2.MODEL_SOURCE_UNSPECIFIED
    """Not known yet, or one that this release does not know."""
    LOCAL = model_pb2.MODEL_SOURCE_LOCAL
    """A local folder."""
    CACHED = model_pb2.MODEL_SOURCE_CACHED
    """A snapshot in the daemon's cache."""
    HUB = model_pb2.MODEL_SOURCE_HUB
    """The hub; a download came first."""


class SkipReason(IntEnum):
    """Why a download leaves a file out."""

    UNSPECIFIED = cache_pb2.SKIP_REASON_UNSPECIFIED
    """One that this release does not know."""
    PICKLE = cache_pb2.SKIP_REASON_PICKLE
    """Weights as a pickle, which can run code."""
    OTHER_FORMAT = cache_pb2.SKIP_REASON_OTHER_FORMAT
    """Weights in another format than safetensors."""
    OTHER_COPY = cache_pb2.SKIP_REASON_OTHER_COPY
    """Another copy of the weights in safetensors, such as another precision."""
    CODE = cache_pb2.SKIP_REASON_CODE
    """Code, which is never run."""
    NOT_NEEDED = cache_pb2.SKIP_REASON_NOT_NEEDED
    """Nothing that loading reads."""


class ProblemKind(IntEnum):
    """What can be wrong with a file."""

    UNSPECIFIED = cache_pb2.PROBLEM_KIND_UNSPECIFIED
    """One that this release does not know."""
    MISSING = cache_pb2.PROBLEM_KIND_MISSING
    """It is not there, or its link leads nowhere."""
    SIZE = cache_pb2.PROBLEM_KIND_SIZE
    """It is longer or shorter than it should be."""
    CONTENT = cache_pb2.PROBLEM_KIND_CONTENT
    """It has the right size and another content."""
    LINK = cache_pb2.PROBLEM_KIND_LINK
    """Its link leads out of the repository's own files."""


class FinishReason(IntEnum):
    """Why a completion ended."""

    UNSPECIFIED = generation_pb2.FINISH_REASON_UNSPECIFIED
    """One that this release does not know."""
    STOP = generation_pb2.FINISH_REASON_STOP
    """At a stop; the other fields of `Finish` say at which."""
    LENGTH = generation_pb2.FINISH_REASON_LENGTH
    """At `max_new_tokens`, or at the end of the model's context."""
    TIME = generation_pb2.FINISH_REASON_TIME
    """At `max_time`."""
    CANCELLED = generation_pb2.FINISH_REASON_CANCELLED
    """It was cancelled."""


class DeviceType(IntEnum):
    """The kind of a device."""

    UNSPECIFIED = system_pb2.DEVICE_TYPE_UNSPECIFIED
    """One that this release does not know."""
    CPU = system_pb2.DEVICE_TYPE_CPU
    """The box's processors and main memory."""
    CUDA = system_pb2.DEVICE_TYPE_CUDA
    """An NVIDIA GPU, or an AMD one under ROCm."""
    MPS = system_pb2.DEVICE_TYPE_MPS
    """An Apple GPU."""
    XPU = system_pb2.DEVICE_TYPE_XPU
    """An Intel GPU."""


class HealthStatus(IntEnum):
    """What grpc.health.v1 says of a service."""

    UNKNOWN = health_pb2.HealthCheckResponse.UNKNOWN
    """Nothing is known of it yet."""
    SERVING = health_pb2.HealthCheckResponse.SERVING
    """It answers."""
    NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
    """It exists and does not answer now."""
    SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    """The daemon has no service of this name."""
