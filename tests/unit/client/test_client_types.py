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
    DownloadProgress,
    Dtype,
    FinishReason,
    HealthStatus,
    ModelSource,
    ModelState,
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
    assert (*unknown, info.failure) == (None,) * 6
    assert info.options == types.LoadOptions(dtype=None, device_map=None)
    assert info.timings == types.LoadTimings(
        resolve=None, download=None, worker=None, weights=None, total=None
    )


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
    ("downloaded", "total", "rate", "fraction", "remaining"),
    [
        (0, None, 0.0, None, None),
        (0, 100, 0.0, 0.0, None),
        (50, 100, 25.0, 0.5, timedelta(seconds=2)),
        (100, 100, 25.0, 1.0, timedelta(0)),
        (50, None, 25.0, None, None),
    ],
)
def test_how_far_a_download_is(
    downloaded: int,
    total: int | None,
    rate: float,
    fraction: float | None,
    remaining: timedelta | None,
) -> None:
    message = cache_pb2.DownloadProgress(
        downloaded_bytes=downloaded, total_bytes=total or 0, bytes_per_second=rate
    )

    progress = responses.download_progress(message)

    assert isinstance(progress, DownloadProgress)
    assert progress.total_bytes == total
    assert progress.fraction == fraction
    assert progress.remaining == remaining


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
