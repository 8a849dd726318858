"""Sizes and times for people."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaderd.cli.units import age, count, size, span


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
