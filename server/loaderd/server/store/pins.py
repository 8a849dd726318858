"""Who uses which snapshot. What is in use is never deleted."""

from __future__ import annotations

from collections import Counter
from typing import BinaryIO


class Pins:
    """Counts the holders of snapshots. Used by the event loop only."""

    def __init__(self) -> None:
        self._holders: dict[tuple[str, str], Counter[str]] = {}

    def hold(self, repo_id: str, commit: str, holder: str, lock: BinaryIO | None = None) -> Pin:
        """Pins a snapshot until the pin is released.

        Args:
            repo_id: Its repository.
            commit: Its commit.
            holder: Who uses it.
            lock: What tells other processes so; closed with the pin.
        """
        holders = self._holders.setdefault((repo_id, commit), Counter())
        holders[holder] += 1
        return Pin(self, repo_id, commit, holder, lock)

    def holders(self, repo_id: str, commit: str) -> tuple[str, ...]:
        """Who holds a snapshot, sorted."""
        return tuple(sorted(self._holders.get((repo_id, commit), ())))

    def all(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """The holders of every snapshot that has one, by repository and commit."""
        return {snapshot: self.holders(*snapshot) for snapshot in self._holders}

    def release(self, pin: Pin) -> None:
        """Takes a pin back; see `Pin.release`."""
        key = (pin.repo_id, pin.commit)
        holders = self._holders[key]
        holders[pin.holder] -= 1
        self._holders[key] = +holders
        if not self._holders[key]:
            del self._holders[key]


class Pin:
    """One holder's claim on one snapshot; made by `Pins.hold`."""

    def __init__(
        self, pins: Pins, repo_id: str, commit: str, holder: str, lock: BinaryIO | None
    ) -> None:
        self.repo_id = repo_id
        self.commit = commit
        self.holder = holder
        self._pins = pins
        self._lock = lock
        self._released = False

    def release(self) -> None:
        """Gives the claim up; a second time nothing happens."""
        if not self._released:
            self._released = True
            self._pins.release(self)
            if self._lock is not None:
                self._lock.close()
