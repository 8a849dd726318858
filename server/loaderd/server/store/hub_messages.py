"""What the daemon and its download child say to each other: JSON, one message a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from loaderd.server.errors import LoaderdError
from loaderd.server.store.hub_access import RetryPolicy
from loaderd.server.store.plan import (
    DownloadPlan,
    DownloadProgress,
    FileProgress,
    PlannedFile,
    SkippedFile,
    SkipReason,
)
from loaderd.v1.errors_pb2 import ErrorReason

Operation = Literal["plan", "download"]

GO = b"go\n"
"""The daemon's answer to a download's plan: it may begin."""


@dataclass(frozen=True)
class Request:
    """The only thing that the child is told. It comes on stdin, where nobody else sees the token.

    Attributes:
        operation: What to do.
        repo_id: `org/name`.
        revision: A branch, tag or commit.
        cache_dir: The Hugging Face cache.
        endpoint: The hub.
        token: The hub token.
        retry: How often to ask a busy hub.
        allow_pickle: Whether weights in pickles may be fetched.
        distrusted: Paths of files that a download hashes before it takes them for whole.
    """

    operation: Operation
    repo_id: str
    revision: str
    cache_dir: str
    endpoint: str
    token: str | None = field(repr=False)
    retry: RetryPolicy
    allow_pickle: bool
    distrusted: tuple[str, ...]

    def to_line(self) -> bytes:
        """The request as a line of JSON."""
        return _line(asdict(self))

    @staticmethod
    def from_line(line: bytes) -> Request:
        """The inverse of `to_line`."""
        data = json.loads(line)
        data |= {
            "retry": RetryPolicy(**data["retry"]),
            "distrusted": tuple(data["distrusted"]),
        }
        return Request(**data)


@dataclass(frozen=True)
class Alive:
    """The child has started, or something moved: the hub answered, bytes came, a wait began."""


@dataclass(frozen=True)
class Done:
    """The snapshot of a commit is there.

    Attributes:
        commit: The commit.
        stamps: See `plan.Downloaded`.
    """

    commit: str
    stamps: Mapping[str, str]


@dataclass(frozen=True)
class Defect:
    """The child failed in a way that has no domain error; for the daemon's log only."""

    traceback: str


Message = Alive | DownloadPlan | DownloadProgress | Done | Defect | LoaderdError


def encode(message: Message) -> bytes:
    """A message of the child as a line of JSON."""
    match message:
        case LoaderdError():
            content: dict[str, Any] = {"number": message.number, "metadata": message.metadata}
        case DownloadPlan():
            content = {
                "repo_id": message.repo_id,
                "revision": message.revision,
                "commit": message.commit,
                "files": [asdict(file) for file in message.files],
                "skipped": [asdict(file) for file in message.skipped],
                "skipped_count": message.skipped_count,
                "skipped_bytes": message.skipped_bytes,
            }
        case _:
            content = asdict(message)
    kind = LoaderdError if isinstance(message, LoaderdError) else type(message)
    return _line({"kind": kind.__name__, **content})


def decode(line: bytes) -> Message:
    """The inverse of `encode`; a plan comes without the listing.

    Raises:
        ValueError, KeyError, TypeError: No child of ours sent this.
    """
    content = json.loads(line)
    match content.pop("kind"):
        case "LoaderdError":
            number = ErrorReason.ValueType(content["number"])
            return LoaderdError.from_metadata(number, content["metadata"])
        case "DownloadPlan":
            planned = tuple(PlannedFile(**file) for file in content.pop("files"))
            skipped = tuple(map(_skipped, content.pop("skipped")))
            return DownloadPlan(files=planned, skipped=skipped, **content)
        case "DownloadProgress":
            current = tuple(FileProgress(**file) for file in content.pop("files"))
            return DownloadProgress(files=current, **content)
        case "Done":
            return Done(**content)
        case "Defect":
            return Defect(**content)
        case "Alive":
            return Alive()
        case kind:
            raise ValueError(f"unknown message {kind!r}")


def _skipped(content: dict[str, Any]) -> SkippedFile:
    return SkippedFile(**{**content, "reason": SkipReason(content["reason"])})


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"
