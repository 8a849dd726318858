"""Sizes and times for people."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaderd.cli.units import age, count, parse_size, parse_span, size, span


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (38_000_000, "38.0 MB"),
        (80 << 30, "85.9 GB"),
        (5e15, "5000.0 TB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


@given(st.integers(0, 10**15))
def test_a_size_is_close_to_its_number(count: int) -> None:
    number, unit = size(count).split()
    scale = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]

    assert abs(float(number) * scale - count) <= 0.05 * scale + 1e-6 * count


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0.0 s"),
        (0.84, "0.8 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3725, "1 h 2 min"),
        (360_000, "4 d 4 h"),
    ],
)
def test_spans(seconds: float, text: str) -> None:
    assert span(timedelta(seconds=seconds)) == text


def test_counts() -> None:
    assert [count(number, "file") for number in (0, 1, 2)] == ["0 files", "1 file", "2 files"]


def test_ages() -> None:
    assert age(None) == "-"
    assert age(datetime.now(UTC) - timedelta(hours=2, minutes=5, seconds=30)) == "2 h 5 min ago"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0B", 0),
        ("700 B", 700),
        ("50GB", 50_000_000_000),
        ("1.5TB", 1_500_000_000_000),
        ("1.1 MB", 1_100_000),
        ("2kB", 2_000),
        ("2KB", 2_000),
        ("512MiB", 512 << 20),
        ("0.5KiB", 512),
        ("18446744073709551615B", 2**64 - 1),
    ],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize(
    "text",
    [
        *("", "50", "GB", "-1GB", "+1GB", "1,5GB", ".5GB", "1.GB", "1e3GB", "50gb", "50G", "50Mb"),
        *(" 50GB", "50GB ", "50  GB", "0x1GB", "٣GB", "0.5B", "1.0001kB1", "16777217TiB"),
    ],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no "):
        parse_size(text)


@given(st.integers(0, 2**64 - 1))
def test_bytes_are_read_exactly(count: int) -> None:
    assert parse_size(f"{count}B") == count


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30d", timedelta(days=30)),
        ("12h", timedelta(hours=12)),
        ("90m", timedelta(minutes=90)),
        ("45s", timedelta(seconds=45)),
        ("0d", timedelta(0)),
    ],
)
def test_spans_are_read(text: str, expected: timedelta) -> None:
    assert parse_span(text) == expected


@pytest.mark.parametrize(
    "text", ["", "30", "d", "-1d", "1.5h", "3w", "30D", "30 d", "1d12h", "٣d", "9999999999999d"]
)
def test_what_is_no_span_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no time span|is too long"):
        parse_span(text)
