"""How long small calls take while the daemon is busy."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from benchmarks.loading import wait_for_standby
from loaderd.client import Client, Model
from tests.daemon import SpawnedDaemon
from tests.waiting import until

_CALLS = 50


def measure_responsiveness(daemon: SpawnedDaemon, model: Path) -> Table:
    """Health.Check, ListModels and a cancel while idle, while loading and while generating."""
    table = Table("median (worst), ms", "health", "list", "cancel", title="Answers while busy")
    with Client(daemon.address) as client:
        wait_for_standby(client)
        table.add_row("idle", *_time_calls(client), "")

        loading = threading.Event()
        stop = threading.Event()
        loader = threading.Thread(target=_keep_loading, args=(client, model, loading, stop))
        loader.start()
        loading.wait()
        row = _time_calls(client)
        stop.set()
        loader.join()
        table.add_row("while a model loads", *row, "")

        wait_for_standby(client)
        loaded = client.load(str(model))
        with loaded.stream("Count: one, two, three", max_new_tokens=2000, ignore_eos=True) as busy:
            next(iter(busy))
            calls = _time_calls(client)
            cancel = _time_cancels(client, loaded)
        table.add_row("while one generates", *calls, cancel)
        loaded.unload(force=True)
    return table


def _keep_loading(
    client: Client, model: Path, loading: threading.Event, stop: threading.Event
) -> None:
    while not stop.is_set():
        loading.set()
        client.load(str(model)).unload()


def _time_calls(client: Client) -> tuple[str, str]:
    return _times(client.health), _times(client.models)


def _times(call: Callable[[], object]) -> str:
    times = []
    for _ in range(_CALLS):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1000)
        time.sleep(0.01)
    return f"{statistics.median(times):.1f} ({max(times):.1f})"


def _time_cancels(client: Client, model: Model) -> str:
    """From the cancel of a queued stream until the daemon no longer counts it."""
    times = []
    for _ in range(10):
        stream = model.stream("Hello", max_new_tokens=8)
        _wait_for_requests(client, model, 2)
        started = time.perf_counter()
        stream.cancel()
        _wait_for_requests(client, model, 1)
        times.append((time.perf_counter() - started) * 1000)
    return f"{statistics.median(times):.1f} ({max(times):.1f})"


def _wait_for_requests(client: Client, model: Model, count: int) -> None:
    until(lambda: client.model(model.id).info.active_requests == count, interval_s=0)
