"""Deletions that are planned before they are done."""

from __future__ import annotations

from loaderd.client import responses
from loaderd.client.deletion import PlannedDeletion
from loaderd.client.sync.transport import Transport
from loaderd.client.types import Deletion


class DeletionPlan(PlannedDeletion):
    """What would be deleted; made by `CacheClient.plan_delete`."""

    def __init__(self, transport: Transport, deletion: Deletion) -> None:
        super().__init__(deletion)
        self._transport = transport

    def execute(self, *, timeout: float | None = None) -> Deletion:
        """Deletes exactly the planned commits, all of them or none, and says what went.

        Raises:
            SnapshotInUseError: One of them is in use.
            SnapshotNotFoundError: One of them is gone already.
            InvalidArgumentError: They are more than 1000; plan with fewer names.
        """
        return responses.deletion(
            self._transport.call(
                self._transport.stubs.cache.DeleteSnapshots, self._request(), timeout
            ).deletion
        )
