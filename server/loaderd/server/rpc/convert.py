"""Between the domain's types and the messages of loaderd.v1."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from loaderd.server.errors import InvalidArgumentError
from loaderd.server.models.events import ModelEvent
from loaderd.server.models.keep_alive import PINNED
from loaderd.server.models.leases import Lease
from loaderd.server.models.lifecycle import ModelState
from loaderd.server.models.loads import LoadProgress
from loaderd.server.models.placement import Needs, Placement
from loaderd.server.models.planner import LoadPlan
from loaderd.server.models.record import LoadOptions, LoadTimings, ModelView
from loaderd.server.models.replicas import ReplicaView, check_replicas
from loaderd.server.models.where import AUTO, CPU, DISK, Where
from loaderd.server.rpc.convert_cache import download_progress, duration, verify_progress
from loaderd.v1 import model_pb2, system_pb2


def state(value: ModelState | None) -> model_pb2.ModelState.ValueType:
    """The state's number; None is unspecified."""
    if value is None:
        return model_pb2.MODEL_STATE_UNSPECIFIED
    return model_pb2.ModelState.Value(f"MODEL_STATE_{value.name}")


def load_options(message: model_pb2.LoadOptions) -> LoadOptions:
    """The options that a client asks for.

    Raises:
        InvalidArgumentError: A value is out of bounds, or two do not go together.
        UnsupportedOptionError: See `LoadOptions`.
    """
    if message.module_map and message.HasField("device_map"):
        problem = "says itself what device_map would; give one of the two"
        raise InvalidArgumentError("options.module_map", problem)
    where = Where(
        device_map=message.device_map if message.HasField("device_map") else AUTO,
        module_map=tuple(sorted(message.module_map.items())),
        max_memory=tuple(sorted(message.max_memory.items())),
        offload=message.offload,
    )
    return LoadOptions(dtype=message.dtype, quantization=message.quantization, where=where)


def replicas(
    request: model_pb2.LoadModelRequest | model_pb2.PlanModelRequest,
) -> int | None:
    """How many replicas a client asks for; None where it does not say.

    Raises:
        InvalidArgumentError: It is out of bounds.
    """
    return check_replicas(request.replicas) if request.HasField("replicas") else None


def model(view: ModelView) -> model_pb2.Model:
    """A model as clients see it."""
    message = model_pb2.Model(
        id=view.id,
        name=view.name,
        source=model_pb2.ModelSource.Value(f"MODEL_SOURCE_{view.source.name}"),
        repo_id=view.repo_id,
        commit=view.commit,
        state=state(view.state),
        options=_options_asked_for(view.options),
        details=view.details,
        active_requests=view.active_requests,
        created_at=Timestamp(),
        timings=_timings(view.timings),
        stale=view.stale,
        keep_alive=duration(-1.0 if view.keep_alive_s == PINNED else view.keep_alive_s),
        active_leases=view.active_leases,
        expires_at=_timestamp(view.expires),
        last_used_at=_timestamp(view.last_used),
        statistics=view.statistics,
        wanted_replicas=view.wanted_replicas,
        replicas=map(_replica, view.replicas),
    )
    message.created_at.FromDatetime(view.created_at)
    if view.ready_at is not None:
        message.ready_at.FromDatetime(view.ready_at)
    if view.failure is not None:
        message.failure.reason = view.failure.number
        message.failure.message = str(view.failure)
    return message


def _replica(view: ReplicaView) -> model_pb2.Replica:
    message = model_pb2.Replica(
        number=view.number,
        worker_pid=view.pid,
        devices=view.devices,
        running_requests=view.running,
        queued_requests=view.queued,
        memory_bytes=view.memory_bytes,
        leaving=view.leaving,
    )
    message.ready_at.FromDatetime(view.ready_at)
    return message


def _options_asked_for(options: LoadOptions) -> model_pb2.LoadOptions:
    """The options without those that have their default."""
    where = options.where
    return model_pb2.LoadOptions(
        dtype=options.dtype or None,
        device_map=None if where.device_map == AUTO else where.device_map,
        quantization=options.quantization or None,
        module_map=dict(where.module_map),
        max_memory=dict(where.max_memory),
        offload=where.offload or None,
    )


def _timings(timings: LoadTimings) -> model_pb2.LoadTimings:
    return model_pb2.LoadTimings(
        resolve=duration(timings.resolve),
        download=duration(timings.download),
        verify=duration(timings.verify),
        placement=duration(timings.placement),
        worker=duration(timings.worker),
        weights=duration(timings.weights),
        engine=duration(timings.engine),
        total=duration(timings.total),
    )


def lease(value: Lease) -> model_pb2.Lease:
    """A lease as its holder sees it."""
    return model_pb2.Lease(
        id=value.id,
        model_id=value.model_id,
        ttl=duration(value.ttl_s),
        expires_at=_timestamp(value.expires),
    )


def keep_alive(request: Message, field: str = "keep_alive") -> float | None:
    """Seconds that a client wants a model to stay unused; None where it does not say."""
    seconds = span(request, field)
    return PINNED if seconds is not None and seconds < 0 else seconds


def span(request: Message, field: str) -> float | None:
    """Seconds of a field that is a Duration within its bounds; None where it is not set."""
    if not request.HasField(field):
        return None
    seconds: float = getattr(request, field).ToTimedelta().total_seconds()
    return seconds


def _timestamp(monotonic: float | None) -> Timestamp | None:
    """A monotonic time as the wall clock tells it now."""
    if monotonic is None:
        return None
    message = Timestamp()
    message.FromDatetime(datetime.now(UTC) + timedelta(seconds=monotonic - time.monotonic()))
    return message


def model_event(event: ModelEvent) -> model_pb2.ModelEvent:
    """A change of state as clients see it."""
    message = model_pb2.ModelEvent(
        sequence=event.sequence,
        previous_state=state(event.previous),
        model=model(event.model),
        reason=model_pb2.ChangeReason.Value(f"CHANGE_REASON_{event.reason.name}"),
        previous_duration=duration(event.previous_s),
    )
    message.time.FromDatetime(event.time)
    return message


def load_progress(progress: LoadProgress) -> model_pb2.LoadProgress:
    """What a load is doing, as clients see it."""
    reading = progress.verification
    return model_pb2.LoadProgress(
        model_id=progress.model_id,
        state=state(progress.state),
        download=None if progress.download is None else download_progress(progress.download),
        elapsed=duration(progress.elapsed_s),
        verification=None if reading is None else verify_progress(reading),
    )


def load_plan(plan: LoadPlan) -> model_pb2.PlanModelResponse:
    """What a load would take, as clients see it."""
    placement = plan.placement
    return model_pb2.PlanModelResponse(
        fits=placement.fits,
        devices=[
            model_pb2.PlannedDevice(id=device, bytes=count)
            for device, count in placement.devices.items()
        ],
        needed_bytes=placement.needed_bytes,
        free_bytes=placement.free_bytes,
        holders=[
            system_pb2.MemoryHolder(model_id=each.id, name=each.name, bytes=each.bytes)
            for each in placement.holders
        ],
        breakdown=_breakdown(plan.replicas[0], plan.estimate.needs),
        dtype=plan.dtype.dtype,
        dtype_reason=plan.dtype.reason,
        kv_tokens=plan.estimate.kv_tokens,
        unknown=plan.estimate.unknown,
        offloaded_cpu_bytes=placement.offloaded.get(CPU, 0),
        offloaded_disk_bytes=placement.offloaded.get(DISK, 0),
    )


def _breakdown(placement: Placement, needs: Needs) -> model_pb2.MemoryBreakdown:
    """What a plan's bytes are made of; the rest is headroom."""
    parts = model_pb2.MemoryBreakdown(
        weights_bytes=needs.weights - placement.offloaded.get(DISK, 0),
        kv_cache_bytes=needs.kv_cache,
        activation_bytes=needs.activations * placement.computing,
        copies_bytes=needs.copies if placement.copies else 0,
    )
    counted = sum(count for _, count in parts.ListFields())
    parts.headroom_bytes = max(placement.needed_bytes - counted, 0)
    return parts
