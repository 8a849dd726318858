"""How long until a model answers, and what the daemon itself costs."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.table import Table

from loaderd.client import Client
from tests.daemon import SpawnedDaemon
from tests.waiting import until

_BARE_SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float16, device_map="auto")
AutoTokenizer.from_pretrained(sys.argv[1])
"""


def measure_loading(daemon: SpawnedDaemon, model: Path, rounds: int) -> Table:
    """LoadModel to READY with a warm standby, beside a new Python process that loads the same."""
    idle_rss = daemon.rss_bytes
    loads, scripts = [], []
    with Client(daemon.address) as client:
        for _ in range(rounds):
            wait_for_standby(client)
            started = time.perf_counter()
            loaded = client.load(str(model), dtype="float16")
            loads.append(time.perf_counter() - started)
            loaded.unload()
            wait_for_standby(client)
            started = time.perf_counter()
            command = [sys.executable, "-c", _BARE_SCRIPT, str(model)]
            subprocess.run(command, check=True, capture_output=True)
            scripts.append(time.perf_counter() - started)
    table = Table("", "loaderd", "a Python script", "ratio", title="Loading a cached model")
    ours, bare = statistics.median(loads), statistics.median(scripts)
    table.add_row("until READY (median)", f"{ours:.2f} s", f"{bare:.2f} s", f"{bare / ours:.1f} x")
    table.add_row("until READY (worst)", f"{max(loads):.2f} s", f"{max(scripts):.2f} s", "")
    table.add_row("daemon's memory, nothing loaded", f"{idle_rss / 1e6:.0f} MB", "", "")
    return table


def wait_for_standby(client: Client) -> None:
    """Waits until a spare worker has imported everything."""
    until(lambda: client.info().standby_workers > 0, patience_s=60)
