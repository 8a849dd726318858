"""Deletions that are planned before they are done."""
# ruff: noqa: ASYNC109 - `timeout` is the call's deadline, which travels to the daemon

from __future__ import annotations

from loaderd.client import responses
from loaderd.client.aio.transport import AsyncTransport
from loaderd.client.deletion import PlannedDeletion
from loaderd.client.types import Deletion


class AsyncDeletionPlan(PlannedDeletion):
    """What would be deleted; made by `AsyncCacheClient.plan_delete`."""

    def __init__(self, transport: AsyncTransport, deletion: Deletion) -> None:
        super().__init__(deletion)
        self._transport = transport

    async def execute(self, *, timeout: float | None = None) -> Deletion:
        """Deletes exactly the planned commits, all of them or none, and says what went.

        Raises:
            SnapshotInUseError: One of them is in use.
            SnapshotNotFoundError: One of them is gone already.
            InvalidArgumentError: They are more than 1000; plan with fewer names.
        """
        response = await self._transport.call(
            self._transport.stubs.cache.DeleteSnapshots, self._request(), timeout
        )
        return responses.deletion(response.deletion)
