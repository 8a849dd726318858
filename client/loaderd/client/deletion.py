"""What both deletion plans know and build without asking the daemon."""

from __future__ import annotations

from loaderd.client.requests import delete_request
from loaderd.client.types import Deletion, Snapshot
from loaderd.v1 import cache_pb2


class PlannedDeletion:
    """Base of `DeletionPlan` and `AsyncDeletionPlan`."""

    def __init__(self, deletion: Deletion) -> None:
        self._deletion = deletion

    @property
    def deletion(self) -> Deletion:
        """The whole plan, as `execute` would tell it if nothing changed."""
        return self._deletion

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """The snapshots that would go."""
        return self._deletion.snapshots

    @property
    def freed_bytes(self) -> int:
        """Bytes that the disk would get back."""
        return self._deletion.freed_bytes

    @property
    def kept(self) -> tuple[Snapshot, ...]:
        """Snapshots that were named and are in use, see `in_use_by`: `execute` is refused."""
        return self._deletion.kept

    @property
    def orphan_files(self) -> int:
        """Number of unfinished and left-over files that would go."""
        return self._deletion.orphan_files

    @property
    def remaining_bytes(self) -> int:
        """Bytes that the cache would take afterwards."""
        return self._deletion.remaining_bytes

    def __repr__(self) -> str:
        names = ", ".join(f"{each.repo_id}@{each.commit[:12]}" for each in self.snapshots)
        return f"{type(self).__name__}({names}; frees {self.freed_bytes} bytes)"

    def _request(self) -> cache_pb2.DeleteSnapshotsRequest:
        # By commit: what a branch points to, and what else came, may have changed meanwhile.
        planned = (*self.snapshots, *self.kept)
        return delete_request((f"{each.repo_id}@{each.commit}" for each in planned), dry_run=False)
