"""What the daemon and its child say to each other comes over as it was said."""

from __future__ import annotations

import pytest

from loaderd.server.errors import (
    DiskFullError,
    LoaderdError,
    RevisionNotFoundError,
    SnapshotCorruptError,
)
from loaderd.server.store.hub_access import RetryPolicy
from loaderd.server.store.hub_messages import (
    Alive,
    Defect,
    Done,
    Message,
    Request,
    decode,
    encode,
)
from loaderd.server.store.plan import (
    DownloadPlan,
    DownloadProgress,
    FileProgress,
    PlannedFile,
    SkippedFile,
    SkipReason,
)

MESSAGES: list[Message] = [
    Alive(),
    DownloadPlan(
        "org/model",
        "main",
        "a" * 40,
        (PlannedFile("a.json", 3, "b" * 40, cached=True, partial_bytes=2),),
        (SkippedFile("b.bin", 9, SkipReason.PICKLE),),
        skipped_count=3,
        skipped_bytes=11,
    ),
    DownloadProgress(1, 2, 3, 4, 5.5, (FileProgress("a.json", 1, 3),), 6, 7),
    Done("a" * 40, {"b" * 40: "1-2-3"}),
    Defect("Traceback:\n  line\n"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_come_over(message: Message) -> None:
    line = encode(message)
    assert line.count(b"\n") == 1
    assert decode(line) == message


@pytest.mark.parametrize(
    "error",
    [
        RevisionNotFoundError("org/model", "v\n1"),
        SnapshotCorruptError("org/model", "a b.json", "1 bytes", "2 bytes"),
        DiskFullError(1 << 60, 7),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_come_over(error: LoaderdError) -> None:
    line = encode(error)
    assert line.count(b"\n") == 1
    other = decode(line)
    assert type(other) is type(error)
    assert vars(other) == vars(error)


@pytest.mark.parametrize(
    "line", [b"", b"{}", b"[]", b"hello\n", b'{"kind": "Other"}', b'{"kind": "Done"}']
)
def test_other_lines_are_no_messages(line: bytes) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        decode(line)


def test_a_request_comes_over_and_does_not_show_its_token() -> None:
    retry = RetryPolicy(attempts=2, first_wait=0.1, longest_wait=1.0)
    request = Request(
        operation="download",
        repo_id="org/model",
        revision="main",
        cache_dir="/hub",
        endpoint="https://hub",
        token="hf_secret",
        retry=retry,
        allow_pickle=True,
        distrusted=("a.json",),
    )
    assert Request.from_line(request.to_line()) == request
    assert "hf_secret" not in repr(request)
