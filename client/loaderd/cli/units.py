"""Sizes and times for people."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


def size(count: float) -> str:
    """Bytes in decimal units: "38.0 MB"."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit, scale in (("kB", 1e3), ("MB", 1e6), ("GB", 1e9)):
        if count < 999.95 * scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e12:.1f} TB"


def count(number: int, noun: str) -> str:
    """How many: "1 file", "3 files"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def span(time: timedelta) -> str:
    """A time span: "0.8 s", "42 s", "3 min 5 s", "2 h 10 min", "4 d 3 h"."""
    seconds = max(time.total_seconds(), 0.0)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def age(moment: datetime | None) -> str:
    """How long ago a moment was; "-" when it is not known."""
    return "-" if moment is None else f"{span(datetime.now(UTC) - moment)} ago"
