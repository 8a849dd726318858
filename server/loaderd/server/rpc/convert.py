"""Between the domain's types and the messages of loaderd.v1."""

from __future__ import annotations

from datetime import timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from loaderd.server.models.events import ModelEvent
from loaderd.server.models.lifecycle import ModelState
from loaderd.server.models.loads import LoadProgress
from loaderd.server.models.record import LoadOptions, LoadTimings, ModelView
from loaderd.server.store.store import DownloadPlan, DownloadProgress, SnapshotInfo
from loaderd.v1 import cache_pb2, model_pb2


def state(value: ModelState | None) -> model_pb2.ModelState.ValueType:
    """The state's number; None is unspecified."""
    if value is None:
        return model_pb2.MODEL_STATE_UNSPECIFIED
    return model_pb2.ModelState.Value(f"MODEL_STATE_{value.name}")


def load_options(message: model_pb2.LoadOptions) -> LoadOptions:
    """The options that a client asks for.

    Raises:
        InvalidArgumentError: A value is out of bounds.
    """
    device_map = message.device_map if message.HasField("device_map") else "auto"
    return LoadOptions(dtype=message.dtype, device_map=device_map)


def duration(seconds: float | None) -> Duration | None:
    """Seconds as a Duration."""
    if seconds is None:
        return None
    message = Duration()
    message.FromTimedelta(timedelta(seconds=seconds))
    return message


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
    )
    message.created_at.FromDatetime(view.created_at)
    if view.ready_at is not None:
        message.ready_at.FromDatetime(view.ready_at)
    if view.failure is not None:
        message.failure.reason = view.failure.number
        message.failure.message = str(view.failure)
    return message


def _options_asked_for(options: LoadOptions) -> model_pb2.LoadOptions:
    """The options without those that have their default."""
    default = LoadOptions()
    return model_pb2.LoadOptions(
        dtype=None if options.dtype == default.dtype else options.dtype,
        device_map=None if options.device_map == default.device_map else options.device_map,
    )


def _timings(timings: LoadTimings) -> model_pb2.LoadTimings:
    return model_pb2.LoadTimings(
        resolve=duration(timings.resolve),
        download=duration(timings.download),
        worker=duration(timings.worker),
        weights=duration(timings.weights),
        total=duration(timings.total),
    )


def model_event(event: ModelEvent) -> model_pb2.ModelEvent:
    """A change of state as clients see it."""
    message = model_pb2.ModelEvent(
        sequence=event.sequence,
        previous_state=state(event.previous),
        model=model(event.model),
    )
    message.time.FromDatetime(event.time)
    return message


def load_progress(progress: LoadProgress) -> model_pb2.LoadProgress:
    """What a load is doing, as clients see it."""
    return model_pb2.LoadProgress(
        model_id=progress.model_id,
        state=state(progress.state),
        download=None if progress.download is None else download_progress(progress.download),
        elapsed=duration(progress.elapsed_s),
    )


def download_progress(progress: DownloadProgress) -> cache_pb2.DownloadProgress:
    """How far a download is, as clients see it."""
    return cache_pb2.DownloadProgress(
        downloaded_bytes=progress.downloaded_bytes,
        total_bytes=progress.total_bytes,
        completed_files=progress.completed_files,
        total_files=progress.total_files,
        bytes_per_second=progress.bytes_per_second,
    )


def download_plan(plan: DownloadPlan) -> cache_pb2.DownloadPlan:
    """What a download would fetch, as clients see it."""
    return cache_pb2.DownloadPlan(
        repo_id=plan.repo_id,
        revision=plan.revision,
        commit=plan.commit,
        files=[
            cache_pb2.PlannedFile(path=file.path, size_bytes=file.size_bytes, cached=file.cached)
            for file in plan.files
        ],
        total_bytes=plan.total_bytes,
        missing_bytes=plan.missing_bytes,
    )


def snapshot(info: SnapshotInfo, *, stale: bool = False) -> cache_pb2.Snapshot:
    """A snapshot as clients see it; stale when the hub could not say whether it is current."""
    message = cache_pb2.Snapshot(
        repo_id=info.repo_id,
        commit=info.commit,
        refs=info.refs,
        size_bytes=info.size_bytes,
        file_count=info.file_count,
        complete=info.complete,
        path=str(info.path),
        stale=stale,
    )
    message.modified_at.FromDatetime(info.modified_at)
    message.last_used_at.FromDatetime(info.last_used_at)
    return message
