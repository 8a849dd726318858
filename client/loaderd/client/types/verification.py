"""Verification of a snapshot's files."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias

from loaderd.client.types.cache import Snapshot
from loaderd.client.types.download import DownloadProgress
from loaderd.client.types.enums import ProblemKind


@dataclass(frozen=True, kw_only=True)
class VerifyProgress:
    """How far a verification is."""

    verified_bytes: int
    """Bytes that were read."""
    total_bytes: int
    """Bytes of all files."""
    verified_files: int
    """Files that were read."""
    total_files: int
    """All files."""
    bytes_per_second: float
    """Mean rate so far."""

    @property
    def fraction(self) -> float:
        """The part that is done, 0 to 1."""
        return self.verified_bytes / self.total_bytes if self.total_bytes else 1.0

    @property
    def remaining(self) -> timedelta | None:
        """The time left at the mean rate; None while nothing was read."""
        if self.bytes_per_second <= 0:
            return None
        left = max(self.total_bytes - self.verified_bytes, 0)
        return timedelta(seconds=left / self.bytes_per_second)


@dataclass(frozen=True, kw_only=True)
class FileProblem:
    """A file of a snapshot that is not as it should be."""

    path: str
    """Path in the repository."""
    kind: ProblemKind
    """What is wrong."""
    expected: str
    """What should be there: a hash, a size, or words."""
    found: str
    """What is there."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What a verification found."""

    snapshot: Snapshot
    """The snapshot as it is now."""
    problems: tuple[FileProblem, ...]
    """The files that were not as they should be, repaired or not."""
    repaired: bool
    """Whether all problems were repaired; False when there were none."""
    verified_files: int
    """Files whose content is what its hash says, those repaired left out."""
    verified_bytes: int
    """Bytes of those."""
    unverifiable_files: tuple[str, ...]
    """Files without a known hash: others put them there."""

    @property
    def ok(self) -> bool:
        """Whether there are no problems, or none any more."""
        return self.repaired or not self.problems


VerifyUpdate: TypeAlias = VerifyProgress | FileProblem | DownloadProgress
"""An item of a verification: how far it is, a problem as it is found, how far the repair is."""
