"""A download's amounts in words."""

from __future__ import annotations

from datetime import timedelta

import pytest

from loaderd.cli.meter import Meter
from loaderd.client import DownloadProgress


def progress(
    downloaded: int, rate: float = 1e6, total: int | None = 100_000_000
) -> DownloadProgress:
    return DownloadProgress(
        downloaded_bytes=downloaded,
        total_bytes=total,
        completed_files=0,
        total_files=None,
        bytes_per_second=rate,
        files=(),
        remaining=timedelta(seconds=(total - downloaded) / rate) if total and rate else None,
        resumed_bytes=0,
        refetched_bytes=0,
    )


def test_the_first_moment_says_nothing_of_the_time_left() -> None:
    meter = Meter()

    assert meter.read(progress(0, rate=0)) == "0 B of 100.0 MB"
    assert meter.read(progress(2_000, rate=1_800)) == "2.0 kB of 100.0 MB, 1.8 kB/s"
    assert meter.read(progress(1_000_000)) == "1.0 MB of 100.0 MB, 1.0 MB/s, 1 min 39 s left"


def test_what_the_cache_had_before_does_not_count() -> None:
    meter = Meter()

    assert meter.read(progress(50_000_000, rate=10)) == "50.0 MB of 100.0 MB, 10 B/s"
    assert meter.read(progress(50_100_000, rate=10)) == "50.1 MB of 100.0 MB, 10 B/s"
    assert "left" in meter.read(progress(51_000_000))


def test_a_slow_download_tells_it_after_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    meter = Meter()
    meter.read(progress(0, rate=0))
    now = 100.9
    assert "left" not in meter.read(progress(1_000, rate=1_000))
    now = 101.0

    assert "left" in meter.read(progress(1_000, rate=1_000))


def test_an_unknown_total_leaves_no_time_to_tell() -> None:
    assert Meter().read(progress(5_000, total=None)) == "5.0 kB, 1.0 MB/s"
