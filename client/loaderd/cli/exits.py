"""The exit codes, and which failure gives which."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loaderd.client import LoaderdError


class ExitCode(IntEnum):
    """How `loaderctl` ends."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    INVALID = 4
    UNAVAILABLE = 5
    PRECONDITION = 6
    EXHAUSTED = 7
    PERMISSION = 8
    DATA_LOSS = 9
    DEADLINE = 10
    INTERRUPTED = 130


MEANINGS = {
    ExitCode.OK: "done",
    ExitCode.FAILED: "another failure",
    ExitCode.USAGE: "wrong usage",
    ExitCode.NOT_FOUND: "model, revision or service not found",
    ExitCode.INVALID: "invalid or unsupported value",
    ExitCode.UNAVAILABLE: "daemon or hub unavailable",
    ExitCode.PRECONDITION: "not possible in this state",
    ExitCode.EXHAUSTED: "disk, memory or queue full",
    ExitCode.PERMISSION: "no permission",
    ExitCode.DATA_LOSS: "model files damaged",
    ExitCode.DEADLINE: "deadline passed",
    ExitCode.INTERRUPTED: "interrupted",
}
"""What `--help` says of each."""

_BY_STATUS = {
    "NOT_FOUND": ExitCode.NOT_FOUND,
    "INVALID_ARGUMENT": ExitCode.INVALID,
    "UNIMPLEMENTED": ExitCode.INVALID,
    "UNAVAILABLE": ExitCode.UNAVAILABLE,
    "FAILED_PRECONDITION": ExitCode.PRECONDITION,
    "RESOURCE_EXHAUSTED": ExitCode.EXHAUSTED,
    "PERMISSION_DENIED": ExitCode.PERMISSION,
    "UNAUTHENTICATED": ExitCode.PERMISSION,
    "DATA_LOSS": ExitCode.DATA_LOSS,
    "DEADLINE_EXCEEDED": ExitCode.DEADLINE,
}
"""The exit code by the name of the canonical gRPC code; FAILED for all others."""


def exit_code(error: LoaderdError) -> ExitCode:
    """The exit code for an error of the SDK."""
    return _BY_STATUS.get(error.code.name, ExitCode.FAILED)
