"""Messages of the daemon as frozen dataclasses."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from typing import Any

import pytest
from grpc_health.v1 import health_pb2

from loaderd.client import (
    Client,
    DeviceType,
    Dtype,
    FinishReason,
    HealthStatus,
    ModelSource,
    ModelState,
    ProblemKind,
    SkipReason,
    responses,
    types,
)
from loaderd.client.receivers import GenerationReceiver
from loaderd.v1 import cache_pb2, generation_pb2, model_pb2, system_pb2


@pytest.mark.parametrize(
    ("kind", "wire", "prefix"),
    [
        (ModelState, model_pb2.ModelState, "MODEL_STATE_"),
        (Dtype, model_pb2.Dtype, "DTYPE_"),
        (ModelSource, model_pb2.ModelSource, "MODEL_SOURCE_"),
        (FinishReason, generation_pb2.FinishReason, "FINISH_REASON_"),
        (DeviceType, system_pb2.DeviceType, "DEVICE_TYPE_"),
        (SkipReason, cache_pb2.SkipReason, "SKIP_REASON_"),
        (ProblemKind, cache_pb2.ProblemKind, "PROBLEM_KIND_"),
        (HealthStatus, health_pb2.HealthCheckResponse.ServingStatus, ""),
    ],
)
def test_enumerations_are_those_of_the_wire(kind: type[IntEnum], wire: Any, prefix: str) -> None:
    assert {f"{prefix}{member.name}": member.value for member in kind} == dict(wire.items())


def test_a_value_of_a_newer_daemon_is_unspecified() -> None:
    model = model_pb2.Model(id="m-1", state=99, source=99)  # type: ignore[arg-type]  # on purpose
    model.failure.reason = 99  # type: ignore[assignment]  # on purpose

    info = responses.model_info(model)

    assert info.state is ModelState.UNSPECIFIED
    assert info.source is ModelSource.UNSPECIFIED
    assert info.failure is not None
    assert info.failure.reason == "99"


def test_what_is_not_known_is_none() -> None:
    info = responses.model_info(model_pb2.Model(id="m-1"))

    unknown = (info.repo_id, info.commit, info.details, info.created_at, info.ready_at)
    assert (*unknown, info.failure, info.statistics) == (None,) * 7
    assert info.options == types.LoadOptions(
        dtype=None, device_map=None, quantization=None, max_memory={}, offload=None
    )
    assert set(dataclasses.asdict(info.timings).values()) == {None}


def test_a_failed_model_says_why() -> None:
    model = model_pb2.Model(state=model_pb2.MODEL_STATE_FAILED)
    model.failure.reason = 16  # type: ignore[assignment]  # DEVICE_MEMORY
    model.failure.message = "too large"

    assert responses.model_info(model).failure == types.ModelFailure(
        reason="DEVICE_MEMORY", message="too large"
    )


def test_times_are_in_utc_and_spans_are_exact() -> None:
    event = model_pb2.ModelEvent()
    event.time.FromJsonString("2024-02-29T12:00:00.25Z")
    progress = model_pb2.LoadProgress()
    progress.elapsed.FromMilliseconds(1250)

    assert responses.model_event(event).time == datetime(2024, 2, 29, 12, 0, 0, 250_000, UTC)
    assert responses.load_progress(progress).elapsed == timedelta(seconds=1.25)


def test_results_are_frozen_and_can_be_compared_and_hashed(client: Client) -> None:
    first, second = client.load("demo/chat").info, client.load("demo/chat").info

    assert first == second
    assert hash(first) == hash(second)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.id = "other"  # type: ignore[misc]  # on purpose


@pytest.mark.parametrize(
    ("downloaded", "total", "fraction"), [(0, None, None), (0, 100, 0.0), (50, 100, 0.5)]
)
def test_how_far_a_download_is(downloaded: int, total: int | None, fraction: float | None) -> None:
    progress = responses.download_progress(
        cache_pb2.DownloadProgress(downloaded_bytes=downloaded, total_bytes=total or 0)
    )

    assert progress.total_bytes == total
    assert progress.fraction == fraction
    assert progress.remaining is None


def test_a_downloads_progress_has_its_files_and_what_the_daemon_says_of_time() -> None:
    message = cache_pb2.DownloadProgress(resumed_bytes=3, refetched_bytes=2)
    message.files.add(path="a", downloaded_bytes=1, size_bytes=5)
    message.remaining.FromMilliseconds(1500)

    progress = responses.download_progress(message)

    assert progress.files == (types.FileProgress(path="a", downloaded_bytes=1, size_bytes=5),)
    assert progress.remaining == timedelta(seconds=1.5)
    assert (progress.resumed_bytes, progress.refetched_bytes) == (3, 2)


@pytest.mark.parametrize(
    ("verified", "total", "rate", "fraction", "remaining"),
    [
        (0, 100, 0.0, 0.0, None),
        (50, 100, 25.0, 0.5, timedelta(seconds=2)),
        (0, 0, 0.0, 1.0, None),  # nothing but empty files
    ],
)
def test_how_far_a_verification_is(
    verified: int, total: int, rate: float, fraction: float, remaining: timedelta | None
) -> None:
    progress = responses.verify_progress(
        cache_pb2.VerifyProgress(verified_bytes=verified, total_bytes=total, bytes_per_second=rate)
    )

    assert (progress.fraction, progress.remaining) == (fraction, remaining)


@pytest.mark.parametrize(
    ("problems", "repaired", "ok"), [(0, False, True), (1, False, False), (1, True, True)]
)
def test_a_report_is_ok_when_no_problem_is_left(problems: int, repaired: bool, ok: bool) -> None:
    problem = cache_pb2.FileProblem(path="a", kind=cache_pb2.PROBLEM_KIND_SIZE)
    message = cache_pb2.VerifyReport(problems=[problem] * problems, repaired=repaired)

    assert responses.verify_report(message).ok is ok


def test_no_limit_is_none() -> None:
    unlimited = cache_pb2.ListSnapshotsResponse()
    limited = cache_pb2.ListSnapshotsResponse(max_bytes=5)

    assert responses.snapshot_list(unlimited).max_bytes is None
    assert responses.snapshot_list(limited).max_bytes == 5


def test_a_stale_model_says_so() -> None:
    assert responses.model_info(model_pb2.Model(stale=True)).stale
    assert not responses.model_info(model_pb2.Model()).stale


def test_a_snapshot_without_refs_is_named_by_its_commit() -> None:
    bare = responses.snapshot(cache_pb2.Snapshot(commit="c" * 40))
    named = responses.snapshot(cache_pb2.Snapshot(commit="c" * 40, refs=["main", "v1"]))

    assert bare.revision == "c" * 40
    assert named.revision == "main"


def test_lists_are_sequences(client: Client) -> None:
    snapshots = client.cache.snapshots()
    with client.watch() as watch:
        models = next(watch)

    assert snapshots[0] in snapshots
    assert list(snapshots[:1]) == [snapshots[0]]
    assert isinstance(models, types.ModelList)
    assert models[:1] == ()


def test_several_completions_are_put_together(client: Client) -> None:
    model = client.load("demo/chat")
    asked: dict[str, Any] = {"n": 3, "max_new_tokens": 9, "temperature": 1.0, "seed": 3}

    whole = model.generate("x", return_token_ids=True, **asked)
    stream = model.stream("x", return_token_ids=True, **asked)
    indices = {delta.index for delta in stream}

    assert indices == {0, 1, 2}
    assert stream.result == whole
    assert [completion.index for completion in whole.completions] == [0, 1, 2]
    assert len({completion.text for completion in whole.completions}) == 3
    assert whole.usage.generated_tokens == 27


def test_the_place_in_the_queue_is_known_until_it_is_the_requests_turn() -> None:
    receiver = GenerationReceiver()
    seen = [receiver.queue_position]
    for event in (
        {"queued": generation_pb2.GenerationQueued(position=2)},
        {"queued": generation_pb2.GenerationQueued(position=0)},
        {"started": generation_pb2.GenerationStarted()},
    ):
        assert receiver.take(generation_pb2.StreamGenerateResponse(**event)) is None
        seen.append(receiver.queue_position)

    assert seen == [None, 2, 0, None]


def test_handles_show_what_they_are(client: Client) -> None:
    model = client.load("demo/chat")

    assert repr(model) == "Model('demo/chat', id='m-1', state=READY)"
