"""The daemon's side of a verification, which reads in threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from loaderd.server.store.plan import DownloadProgress
from loaderd.server.store.scan import SnapshotInfo
from loaderd.server.store.verify import FileProblem, Verification, VerifyProgress, VerifyReport


@dataclass(frozen=True)
class Verified:
    """The end of a verification.

    Attributes:
        report: What was found.
        repaired: Whether the problems that were found are mended.
        snapshot: The snapshot as it is now.
        holders: Who uses it.
    """

    report: VerifyReport
    repaired: bool
    snapshot: SnapshotInfo
    holders: tuple[str, ...]


VerifyUpdate = VerifyProgress | FileProblem | DownloadProgress | Verified
"""What a verification says: a `DownloadProgress` is that of the repair."""


async def run_verification(
    verification: Verification,
) -> AsyncGenerator[VerifyProgress | FileProblem | VerifyReport, None]:
    """Runs a verification in a thread; closing the generator stops it.

    Yields:
        Progress and problems as they come, and the report at the end.
    """
    loop = asyncio.get_running_loop()
    updates: asyncio.Queue[VerifyProgress | FileProblem | None] = asyncio.Queue()
    stopped = threading.Event()

    def tell(update: VerifyProgress | FileProblem) -> None:
        loop.call_soon_threadsafe(updates.put_nowait, update)

    work = asyncio.create_task(asyncio.to_thread(verification.run, tell, stopped))
    work.add_done_callback(lambda _: updates.put_nowait(None))
    try:
        while (update := await updates.get()) is not None:
            yield update
        yield await work
    finally:
        stopped.set()
        await asyncio.wait([work])
