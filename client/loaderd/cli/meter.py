"""How far work on bytes is, in words."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeAlias

from loaderd.cli.units import size, span

if TYPE_CHECKING:
    from datetime import timedelta

    from loaderd.client import DownloadProgress, VerifyProgress

    ByteProgress: TypeAlias = DownloadProgress | VerifyProgress


class Meter:
    """Amounts in words: "12.0 MB of 40.0 MB, 25.0 MB/s, 1.1 s left".

    The rate of the first moment says little: the time left is told from the first second, or the
    first hundredth of the bytes, on.
    """

    def __init__(self) -> None:
        self._begun: float | None = None
        self._bytes_before = 0

    def read(self, progress: ByteProgress) -> str:
        """The words for the latest progress."""
        done = done_bytes(progress)
        if self._begun is None:
            self._begun, self._bytes_before = time.monotonic(), done
        came = done - self._bytes_before
        is_telling = time.monotonic() - self._begun >= 1 or came * 100 >= (
            progress.total_bytes or 0
        )
        return amounts(progress, progress.remaining if is_telling else None)


def amounts(progress: ByteProgress, remaining: timedelta | None) -> str:
    """Bytes, rate and the time left as far as they are known."""
    parts = [size(done_bytes(progress))]
    if progress.total_bytes is not None:
        parts[0] += f" of {size(progress.total_bytes)}"
    if progress.bytes_per_second:
        parts.append(f"{size(progress.bytes_per_second)}/s")
    if remaining:
        parts.append(f"{span(remaining)} left")
    return ", ".join(parts)


def done_bytes(progress: ByteProgress) -> int:
    """The bytes that are done."""
    from loaderd.client import DownloadProgress

    if isinstance(progress, DownloadProgress):
        return progress.downloaded_bytes
    return progress.verified_bytes
