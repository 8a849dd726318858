"""Sizes and times for people, to write and to read."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from fractions import Fraction

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]+)")
_SCALES = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_LARGEST_SIZE = 2**64 - 1

_SPAN = re.compile(r"([0-9]+)([smhd])")
_SPANS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def size(count: float) -> str:
    """Bytes in decimal units: "38.0 MB"."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit, scale in (("kB", 1e3), ("MB", 1e6), ("GB", 1e9)):
        if count < 999.95 * scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e12:.1f} TB"


def parse_size(text: str) -> int:
    """The bytes of a size such as "50GB", "1.5 TB" or "512MiB".

    Raises:
        ValueError: It is none; the text says how to write one.
    """
    match = _SIZE.fullmatch(text)
    scale = _SCALES.get(match[2]) if match else None
    if match is None or scale is None:
        raise ValueError(f"{text!r} is no size; write one as 50GB, 1.5TB or 512MiB")
    bytes_ = Fraction(match[1]) * scale
    if bytes_.denominator != 1 or bytes_ > _LARGEST_SIZE:
        raise ValueError(f"{text!r} is no whole number of bytes from 0 to {_LARGEST_SIZE}")
    return int(bytes_)


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


def brief(time: timedelta) -> str:
    """As `span`, but what is less than a second in milliseconds: "25 ms"."""
    seconds = max(time.total_seconds(), 0.0)
    return f"{seconds * 1000:.0f} ms" if seconds < 0.9995 else span(time)


def parse_span(text: str) -> timedelta:
    """The time span of "30d", "12h", "90m" or "45s".

    Raises:
        ValueError: It is none, or too long; the text says how to write one.
    """
    match = _SPAN.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no time span; write one as 30d, 12h or 90m")
    try:
        return timedelta(**{_SPANS[match[2]]: int(match[1])})
    except OverflowError:
        raise ValueError(f"{text!r} is too long") from None


def parse_replicas(text: str) -> int:
    """A number of replicas, of which the daemon says how many there may be.

    Raises:
        ValueError: It is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} is no number of replicas; write one from 1 on, such as 2")
    return int(text)


def parse_keep_alive(text: str) -> timedelta:
    """A time span, "0", or "always", which is a negative one.

    Raises:
        ValueError: It is none of these; the text says how to write one.
    """
    if text == "always":
        return timedelta(seconds=-1)
    if text == "0":
        return timedelta()
    try:
        return parse_span(text)
    except ValueError as error:
        raise ValueError(f'{error}, 0, or "always"') from None


def age(moment: datetime | None) -> str:
    """How long ago a moment was; "-" when it is not known."""
    return "-" if moment is None else f"{span(datetime.now(UTC) - moment)} ago"
