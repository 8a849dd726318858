"""From the messages of loaderd.v1 to the types of the SDK. Shared by both clients."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message as ProtoMessage
from google.protobuf.timestamp_pb2 import Timestamp

from loaderd.client import types
from loaderd.client.errors import UnexpectedAnswerError
from loaderd.v1 import cache_pb2, errors_pb2, generation_pb2, model_pb2, system_pb2

E = TypeVar("E", bound=IntEnum)


def member(kind: type[E], number: int) -> E:
    """The enumeration's member; its zero for a number of a newer daemon."""
    return kind(number) if number in kind.__members__.values() else kind(0)


def model_info(model: model_pb2.Model) -> types.ModelInfo:
    """A model."""
    return types.ModelInfo(
        id=model.id,
        name=model.name,
        source=member(types.ModelSource, model.source),
        repo_id=model.repo_id or None,
        commit=model.commit or None,
        state=member(types.ModelState, model.state),
        options=_load_options(model.options),
        details=_model_details(model.details) if model.HasField("details") else None,
        active_requests=model.active_requests,
        created_at=_time(model, "created_at", model.created_at),
        ready_at=_time(model, "ready_at", model.ready_at),
        timings=_load_timings(model.timings),
        failure=_model_failure(model.failure) if model.HasField("failure") else None,
        stale=model.stale,
        keep_alive=model.keep_alive.ToTimedelta(),
        expires_at=_time(model, "expires_at", model.expires_at),
        active_leases=model.active_leases,
        last_used_at=_time(model, "last_used_at", model.last_used_at),
        statistics=_statistics(model.statistics) if model.HasField("statistics") else None,
        wanted_replicas=model.wanted_replicas,
        replicas=tuple(map(_replica, model.replicas)),
    )


def _replica(replica: model_pb2.Replica) -> types.Replica:
    return types.Replica(
        number=replica.number,
        worker_pid=replica.worker_pid,
        devices=tuple(replica.devices),
        running_requests=replica.running_requests,
        queued_requests=replica.queued_requests,
        memory_bytes=replica.memory_bytes,
        leaving=replica.leaving,
        ready_at=replica.ready_at.ToDatetime(UTC),
    )


def _statistics(statistics: model_pb2.ModelStatistics) -> types.ModelStatistics:
    return types.ModelStatistics(
        running_requests=statistics.running_requests,
        queued_requests=statistics.queued_requests,
        prompt_tokens=statistics.prompt_tokens,
        cached_prompt_tokens=statistics.cached_prompt_tokens,
        generated_tokens=statistics.generated_tokens,
        prompt_tokens_per_second=statistics.prompt_tokens_per_second,
        generated_tokens_per_second=statistics.generated_tokens_per_second,
        kv_tokens=statistics.kv_tokens,
        kv_capacity_tokens=statistics.kv_capacity_tokens or None,
    )


def lease(lease: model_pb2.Lease) -> types.LeaseInfo:
    """A lease."""
    return types.LeaseInfo(
        id=lease.id,
        model_id=lease.model_id,
        ttl=lease.ttl.ToTimedelta(),
        expires_at=lease.expires_at.ToDatetime(UTC),
    )


def _load_options(options: model_pb2.LoadOptions) -> types.LoadOptions:
    return types.LoadOptions(
        dtype=member(types.Dtype, options.dtype) if options.dtype else None,
        device_map=dict(options.module_map) or options.device_map or None,
        quantization=_quantization(options.quantization),
        max_memory=dict(options.max_memory),
        offload=member(types.Offload, options.offload) if options.offload else None,
    )


def _model_details(details: model_pb2.ModelDetails) -> types.ModelDetails:
    return types.ModelDetails(
        architecture=details.architecture,
        dtype=member(types.Dtype, details.dtype),
        dtype_reason=details.dtype_reason,
        engine=details.engine,
        engine_reason=details.engine_reason,
        context_length=details.context_length or None,
        parameter_count=details.parameter_count,
        weight_bytes=details.weight_bytes,
        device_map=dict(details.device_map),
        has_chat_template=details.has_chat_template,
        supported_parameters=tuple(details.supported_parameters),
        worker_pid=details.worker_pid,
        quantization=_quantization(details.quantization),
        quantization_reason=details.quantization_reason,
        planned_bytes=details.planned_bytes,
        memory_bytes=details.memory_bytes,
        offloaded_bytes=details.offloaded_bytes,
    )


def _quantization(number: int) -> types.Quantization | None:
    return member(types.Quantization, number) if number else None


def _load_timings(timings: model_pb2.LoadTimings) -> types.LoadTimings:
    return types.LoadTimings(
        resolve=_span(timings, "resolve", timings.resolve),
        download=_span(timings, "download", timings.download),
        verify=_span(timings, "verify", timings.verify),
        placement=_span(timings, "placement", timings.placement),
        worker=_span(timings, "worker", timings.worker),
        weights=_span(timings, "weights", timings.weights),
        engine=_span(timings, "engine", timings.engine),
        total=_span(timings, "total", timings.total),
    )


def _model_failure(failure: model_pb2.ModelFailure) -> types.ModelFailure:
    number = int(failure.reason)
    name = errors_pb2.ErrorReason.DESCRIPTOR.values_by_number.get(number)
    reason = name.name.removeprefix("ERROR_REASON_") if name else str(number)
    return types.ModelFailure(reason=reason, message=failure.message)


def load_progress(progress: model_pb2.LoadProgress) -> types.LoadProgress:
    """A load's progress."""
    return types.LoadProgress(
        model_id=progress.model_id,
        state=member(types.ModelState, progress.state),
        download=download_progress(progress.download) if progress.HasField("download") else None,
        verification=verify_progress(progress.verification)
        if progress.HasField("verification")
        else None,
        elapsed=progress.elapsed.ToTimedelta(),
    )


def load_plan(response: model_pb2.PlanModelResponse) -> types.LoadPlan:
    """What a load would take."""
    parts = response.breakdown
    return types.LoadPlan(
        fits=response.fits,
        devices=tuple(
            types.PlannedDevice(id=each.id, bytes=each.bytes) for each in response.devices
        ),
        needed_bytes=response.needed_bytes,
        free_bytes=response.free_bytes,
        holders=tuple(map(_memory_holder, response.holders)),
        breakdown=types.MemoryBreakdown(
            weights_bytes=parts.weights_bytes,
            kv_cache_bytes=parts.kv_cache_bytes,
            activation_bytes=parts.activation_bytes,
            headroom_bytes=parts.headroom_bytes,
            copies_bytes=parts.copies_bytes,
        ),
        dtype=member(types.Dtype, response.dtype),
        dtype_reason=response.dtype_reason,
        kv_tokens=response.kv_tokens,
        unknown=tuple(response.unknown),
        offloaded_cpu_bytes=response.offloaded_cpu_bytes,
        offloaded_disk_bytes=response.offloaded_disk_bytes,
    )


def model_event(event: model_pb2.ModelEvent) -> types.ModelEvent:
    """A change of a model's state."""
    return types.ModelEvent(
        sequence=event.sequence,
        time=event.time.ToDatetime(UTC),
        previous_state=member(types.ModelState, event.previous_state),
        model=model_info(event.model),
        reason=member(types.ChangeReason, event.reason),
        previous_duration=_span(event, "previous_duration", event.previous_duration),
    )


def unload_result(response: model_pb2.UnloadModelResponse) -> types.UnloadResult:
    """What an unload gave back."""
    return types.UnloadResult(model=model_info(response.model), freed_bytes=response.freed_bytes)


def download_progress(progress: cache_pb2.DownloadProgress) -> types.DownloadProgress:
    """A download's progress."""
    return types.DownloadProgress(
        downloaded_bytes=progress.downloaded_bytes,
        total_bytes=progress.total_bytes or None,
        completed_files=progress.completed_files,
        total_files=progress.total_files or None,
        bytes_per_second=progress.bytes_per_second,
        files=tuple(map(_file_progress, progress.files)),
        remaining=_span(progress, "remaining", progress.remaining),
        resumed_bytes=progress.resumed_bytes,
        refetched_bytes=progress.refetched_bytes,
    )


def _file_progress(file: cache_pb2.FileProgress) -> types.FileProgress:
    return types.FileProgress(
        path=file.path, downloaded_bytes=file.downloaded_bytes, size_bytes=file.size_bytes
    )


def cancelled_download(response: cache_pb2.CancelDownloadResponse) -> types.CancelledDownload:
    """What was stopped."""
    return types.CancelledDownload(waiters=response.waiters, kept_bytes=response.kept_bytes)


def snapshot(message: cache_pb2.Snapshot) -> types.Snapshot:
    """A snapshot in the cache."""
    return types.Snapshot(
        repo_id=message.repo_id,
        commit=message.commit,
        refs=tuple(message.refs),
        size_bytes=message.size_bytes,
        unique_bytes=message.unique_bytes,
        file_count=message.file_count,
        complete=message.complete,
        modified_at=_time(message, "modified_at", message.modified_at),
        last_used_at=_time(message, "last_used_at", message.last_used_at),
        path=message.path,
        stale=message.stale,
        in_use_by=tuple(message.in_use_by),
    )


def snapshot_list(response: cache_pb2.ListSnapshotsResponse) -> types.SnapshotList:
    """All snapshots."""
    return types.SnapshotList(
        snapshots=tuple(map(snapshot, response.snapshots)),
        total_bytes=response.total_bytes,
        orphan_bytes=response.orphan_bytes,
        downloads=tuple(map(_download, response.downloads)),
        free_bytes=response.free_bytes,
        max_bytes=response.max_bytes or None,
    )


def _download(message: cache_pb2.Download) -> types.Download:
    return types.Download(
        model=message.model,
        progress=download_progress(message.progress),
        waiters=message.waiters,
    )


def resolution(response: cache_pb2.ResolveModelResponse) -> types.Resolution:
    """Where a name's files are.

    Raises:
        UnexpectedAnswerError: The daemon says so in a way that this release does not know.
    """
    match response.WhichOneof("resolution"):
        case "local":
            local = response.local
            return types.LocalFolder(path=local.path, size_bytes=local.size_bytes)
        case "cached":
            return snapshot(response.cached)
        case "download":
            return download_plan(response.download)
    raise UnexpectedAnswerError("the daemon's answer has no resolution that this release knows")


def download_plan(plan: cache_pb2.DownloadPlan) -> types.DownloadPlan:
    """What a download would fetch."""
    return types.DownloadPlan(
        repo_id=plan.repo_id,
        revision=plan.revision,
        commit=plan.commit,
        files=tuple(map(_planned_file, plan.files)),
        total_bytes=plan.total_bytes,
        missing_bytes=plan.missing_bytes,
        skipped=tuple(map(_skipped_file, plan.skipped)),
        skipped_count=plan.skipped_count,
        skipped_bytes=plan.skipped_bytes,
    )


def _planned_file(file: cache_pb2.PlannedFile) -> types.PlannedFile:
    return types.PlannedFile(
        path=file.path,
        size_bytes=file.size_bytes,
        cached=file.cached,
        partial_bytes=file.partial_bytes,
    )


def _skipped_file(file: cache_pb2.SkippedFile) -> types.SkippedFile:
    return types.SkippedFile(
        path=file.path, size_bytes=file.size_bytes, reason=member(types.SkipReason, file.reason)
    )


def verify_progress(progress: cache_pb2.VerifyProgress) -> types.VerifyProgress:
    """A verification's progress."""
    return types.VerifyProgress(
        verified_bytes=progress.verified_bytes,
        total_bytes=progress.total_bytes,
        verified_files=progress.verified_files,
        total_files=progress.total_files,
        bytes_per_second=progress.bytes_per_second,
    )


def file_problem(problem: cache_pb2.FileProblem) -> types.FileProblem:
    """What is wrong with a file."""
    return types.FileProblem(
        path=problem.path,
        kind=member(types.ProblemKind, problem.kind),
        expected=problem.expected,
        found=problem.found,
    )


def verify_report(report: cache_pb2.VerifyReport) -> types.VerifyReport:
    """What a verification found."""
    return types.VerifyReport(
        snapshot=snapshot(report.snapshot),
        problems=tuple(map(file_problem, report.problems)),
        repaired=report.repaired,
        verified_files=report.verified_files,
        verified_bytes=report.verified_bytes,
        unverifiable_files=tuple(report.unverifiable_files),
    )


def deletion(message: cache_pb2.Deletion) -> types.Deletion:
    """What was, or would be, deleted."""
    return types.Deletion(
        snapshots=tuple(map(snapshot, message.snapshots)),
        freed_bytes=message.freed_bytes,
        orphan_files=message.orphan_files,
        kept=tuple(map(snapshot, message.kept)),
        remaining_bytes=message.remaining_bytes,
    )


def generation_started(started: generation_pb2.GenerationStarted) -> types.GenerationStarted:
    """What is known when computation begins."""
    return types.GenerationStarted(
        request_id=started.request_id,
        model_id=started.model_id,
        prompt_tokens=started.prompt_tokens,
        seed=started.seed,
    )


def delta(message: generation_pb2.GenerationDelta) -> types.Delta:
    """New text."""
    return types.Delta(
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=logprobs(message.logprobs),
        index=message.index,
    )


def logprobs(messages: Iterable[generation_pb2.TokenLogprob]) -> tuple[types.TokenLogprob, ...]:
    """Log probabilities of some tokens."""
    return tuple(
        types.TokenLogprob(
            token_id=message.token_id,
            text=message.text,
            logprob=message.logprob,
            top=tuple(
                types.TokenAlternative(
                    token_id=other.token_id, text=other.text, logprob=other.logprob
                )
                for other in message.top
            ),
        )
        for message in messages
    )


def finish(message: generation_pb2.Finish) -> types.Finish:
    """How a completion ended."""
    stop = message.WhichOneof("stop_reason")
    return types.Finish(
        reason=member(types.FinishReason, message.reason),
        eos_token_id=message.eos_token_id if stop == "eos_token_id" else None,
        stop_token_id=message.stop_token_id if stop == "stop_token_id" else None,
        stop_string=message.stop_string if stop == "stop_string" else None,
    )


def usage(message: generation_pb2.Usage) -> types.Usage:
    """Token counts."""
    return types.Usage(
        prompt_tokens=message.prompt_tokens,
        cached_prompt_tokens=message.cached_prompt_tokens,
        generated_tokens=message.generated_tokens,
    )


def generation_timings(message: generation_pb2.GenerationTimings) -> types.GenerationTimings:
    """How long a request took."""
    return types.GenerationTimings(
        queue=message.queue.ToTimedelta(),
        prefill=message.prefill.ToTimedelta(),
        decode=message.decode.ToTimedelta(),
        time_to_first_token=message.time_to_first_token.ToTimedelta(),
    )


def generation_result(response: generation_pb2.GenerateResponse) -> types.GenerationResult:
    """A finished generation.

    Raises:
        UnexpectedAnswerError: It has no completion.
    """
    if not response.completions:
        raise UnexpectedAnswerError("the daemon's answer has no completion")
    return types.GenerationResult(
        request_id=response.request_id,
        model_id=response.model_id,
        completions=tuple(
            types.Completion(
                index=completion.index,
                text=completion.text,
                token_ids=tuple(completion.token_ids),
                logprobs=logprobs(completion.logprobs),
                finish=finish(completion.finish),
            )
            for completion in response.completions
        ),
        prompt_logprobs=logprobs(response.prompt_logprobs),
        usage=usage(response.usage),
        timings=generation_timings(response.timings),
        seed=response.seed,
    )


def tokenization(response: generation_pb2.TokenizeResponse) -> types.Tokenization:
    """A text as tokens."""
    return types.Tokenization(token_ids=tuple(response.token_ids), tokens=tuple(response.tokens))


def rendered_prompt(response: generation_pb2.ApplyChatTemplateResponse) -> types.RenderedPrompt:
    """What a chat template made of messages."""
    return types.RenderedPrompt(text=response.text, token_ids=tuple(response.token_ids))


def server_info(response: system_pb2.GetServerInfoResponse) -> types.ServerInfo:
    """The daemon."""
    return types.ServerInfo(
        version=response.version,
        started_at=_time(response, "started_at", response.started_at),
        uptime=response.uptime.ToTimedelta(),
        pid=response.pid,
        cache_dir=response.cache_dir,
        local_roots=tuple(response.local_roots),
        hub_endpoint=response.hub_endpoint,
        offline=response.offline,
        draining=response.draining,
        standby_workers=response.standby_workers,
        versions=dict(response.versions),
        capabilities=tuple(response.capabilities),
        active_requests=response.active_requests,
        clients=response.clients,
    )


def device(message: system_pb2.Device) -> types.Device:
    """A device."""
    return types.Device(
        id=message.id,
        type=member(types.DeviceType, message.type),
        name=message.name,
        total_bytes=message.total_bytes,
        free_bytes=message.free_bytes,
        cores=message.cores or None,
        reserved_bytes=message.reserved_bytes,
        taken_bytes=message.taken_bytes,
        holders=tuple(map(_memory_holder, message.holders)),
        available_bytes=message.available_bytes,
    )


def _memory_holder(message: system_pb2.MemoryHolder) -> types.MemoryHolder:
    return types.MemoryHolder(model_id=message.model_id, name=message.name, bytes=message.bytes)


def _time(owner: ProtoMessage, field: str, value: Timestamp) -> datetime | None:
    return value.ToDatetime(UTC) if owner.HasField(field) else None


def _span(owner: ProtoMessage, field: str, value: Duration) -> timedelta | None:
    return value.ToTimedelta() if owner.HasField(field) else None
