import dataclasses
from typing import get_type_hints

import pytest
from google.rpc import error_details_pb2

from loaderd.server import errors
from loaderd.server.rpc.status import status_of
from loaderd.v1.errors_pb2 import ErrorReason

_DETAILS = {
    "MODEL_NOT_FOUND": "ResourceInfo",
    "REVISION_NOT_FOUND": "ResourceInfo",
    "MODEL_GATED": "ResourceInfo",
    "INVALID_NAME": "BadRequest",
    "INVALID_ARGUMENT": "BadRequest",
    "UNSUPPORTED_OPTION": "BadRequest",
    "HUB_UNREACHABLE": "RetryInfo",
    "HUB_RATE_LIMITED": "RetryInfo",
    "OFFLINE_NOT_CACHED": "PreconditionFailure",
    "MODEL_IN_USE": "PreconditionFailure",
    "MODEL_NOT_LOADED": "PreconditionFailure",
    "MODEL_UNSUPPORTED": "PreconditionFailure",
    "DISK_FULL": "QuotaFailure",
    "DEVICE_MEMORY": "QuotaFailure",
    "QUEUE_FULL": "QuotaFailure",
    "SLOW_CONSUMER": "QuotaFailure",
    "WORKER_DIED": "RetryInfo",
    "DRAINING": "RetryInfo",
    "HUB_UNAUTHORIZED": "ResourceInfo",
    "SNAPSHOT_NOT_FOUND": "ResourceInfo",
    "SNAPSHOT_IN_USE": "PreconditionFailure",
    "CACHE_LIMIT": "QuotaFailure",
    "CACHE_NOT_WRITABLE": "PreconditionFailure",
    "DOWNLOAD_INTERRUPTED": "RetryInfo",
    "LEASE_NOT_FOUND": "ResourceInfo",
    "CLIENT_LIMIT": "QuotaFailure",
    "MODEL_NOT_ALLOWED": "ResourceInfo",
    "MODEL_TOO_LARGE": "ResourceInfo",
}


def example(kind: type[errors.LoaderdError]) -> errors.LoaderdError:
    hints = get_type_hints(kind)
    values = {
        f.name: 7 if hints[f.name] in (int, int | None) else f"some {f.name}"
        for f in dataclasses.fields(kind)
    }
    return kind(**values)


def test_every_reason_of_the_contract_has_one_error() -> None:
    reasons = {name.removeprefix("ERROR_REASON_") for name, _ in ErrorReason.items()}
    assert set(errors.BY_REASON) == reasons - {"UNSPECIFIED"}


@pytest.mark.parametrize("reason", sorted(errors.BY_REASON))
def test_an_error_survives_the_way_between_processes(reason: str) -> None:
    error = example(errors.BY_REASON[reason])
    copy = errors.LoaderdError.from_metadata(error.number, error.metadata)
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.metadata == error.metadata


def test_what_is_not_known_is_neither_told_nor_sent() -> None:
    error = errors.DeviceMemoryError("org/name")
    assert error.metadata == {"model": "org/name"}
    assert str(error) == (
        "not enough device memory for 'org/name'; unload another model or choose another device"
    )
    copy = errors.LoaderdError.from_metadata(error.number, error.metadata)
    assert isinstance(copy, errors.DeviceMemoryError)
    assert (copy.needed_bytes, copy.free_bytes, copy.holders) == (None, None, None)


def test_people_are_told_sizes_and_programs_bytes() -> None:
    error = errors.DeviceMemoryError("a/b", 467_555_180, 2_104_000_000, "c/d (0.3 GB)")
    assert str(error) == (
        "not enough device memory for 'a/b': 467.6 MB are needed, 2.10 GB are free, held by "
        "c/d (0.3 GB); unload another model or choose another device"
    )
    assert error.metadata["needed_bytes"] == "467555180"
    assert str(errors.DiskFullError(5_000_000_000, 17)) == (
        "the cache's disk needs 5.00 GB for this, 17 bytes are free"
    )


@pytest.mark.parametrize("reason", sorted(errors.BY_REASON))
def test_a_status_holds_the_reason_its_fields_and_the_details_that_fit(reason: str) -> None:
    error = example(errors.BY_REASON[reason])
    status = status_of(error, "r-1")
    assert status.message == str(error)
    assert status.code not in {0, 2}  # neither OK nor UNKNOWN
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == (reason, "loaderd")
    assert dict(info.metadata) == {**error.metadata, "request_id": "r-1"}
    kinds = {detail.TypeName().removeprefix("google.rpc.") for detail in status.details}
    assert _DETAILS.get(reason, "ErrorInfo") in kinds


def test_texts_say_the_fields() -> None:
    for kind in errors.BY_REASON.values():
        error = example(kind)
        for name, value in error.metadata.items():
            if name not in {"expected", "found"}:
                assert value in str(error), (kind, name)
