"""How fast a model comes from a hub, beside the hub library on its own."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from loaderd.client import Client
from tests.daemon import SpawnedDaemon

REPO = "bench/shards"
SHARDS = 8
SHARD_BYTES = 128 << 20

_PLAIN_SCRIPT = """
import json, time
from huggingface_hub import snapshot_download
started = time.perf_counter()
snapshot_download("bench/shards")
print(json.dumps(time.perf_counter() - started))
"""


@dataclass(frozen=True)
class _Plain:
    """The hub library in a process of its own: seconds in the call, and with start and import."""

    call: float
    process: float


def measure_downloading(rounds: int) -> Table:
    """A repository of eight shards by the daemon, hashing included, and by `snapshot_download`."""
    with tempfile.TemporaryDirectory(prefix="downloading-") as folder, _hub(Path(folder)) as url:
        plain, ours, growth = _alternate(Path(folder), url, rounds)
    size = SHARDS * SHARD_BYTES
    call = statistics.median(each.call for each in plain)
    process = statistics.median(each.process for each in plain)
    daemon = statistics.median(ours)
    title = f"Downloading {SHARDS} shards of {SHARD_BYTES >> 20} MiB from a hub on this box"
    table = Table(
        "median of " + str(rounds), "seconds", "MB/s", "loaderd's rate to it", title=title
    )
    for name, seconds in (
        ("loaderd, every file hashed", daemon),
        ("snapshot_download, the call", call),
        ("snapshot_download, a new process", process),
    ):
        table.add_row(
            name, f"{seconds:.2f}", f"{size / seconds / 1e6:.0f}", f"{seconds / daemon:.2f}"
        )
    table.add_row("growth of the daemon's memory", "", "", f"{growth / 1e6:.0f} MB")
    return table


def _alternate(folder: Path, url: str, rounds: int) -> tuple[list[_Plain], list[float], int]:
    """Both sides, each first in every other round: who comes second finds the disk still busy."""
    plain, ours = [], []
    variables = {"HF_ENDPOINT": url, "LOADERD_LOG_LEVEL": "warning"}
    (folder / "daemon").mkdir()
    with (
        SpawnedDaemon(folder / "daemon", ["--standby", "0"], variables) as daemon,
        Client(daemon.address) as client,
        _Peak(daemon) as peak,
    ):
        sides: list[Callable[[], None]] = [
            lambda: plain.append(_plainly(folder / "plain", url)),
            lambda: ours.append(_by_daemon(client, daemon)),
        ]
        for _ in range(rounds):
            for side in sides:
                side()
            sides.reverse()
    return plain, ours, peak.growth


def _by_daemon(client: Client, daemon: SpawnedDaemon) -> float:
    started = time.perf_counter()
    snapshot = client.cache.download(REPO)
    seconds = time.perf_counter() - started
    if snapshot.size_bytes < SHARDS * SHARD_BYTES:
        raise RuntimeError("the daemon did not bring everything")
    shutil.rmtree(daemon.cache_dir)
    return seconds


def _plainly(home: Path, url: str) -> _Plain:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    own = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _PLAIN_SCRIPT],
        env=inherited | own,
        check=True,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - started
    shutil.rmtree(home)
    return _Plain(json.loads(done.stdout), seconds)


class _Peak:
    """Watches a daemon's own resident memory while it is entered."""

    def __init__(self, daemon: SpawnedDaemon) -> None:
        self._daemon = daemon
        self._before = self._most = daemon.rss_bytes
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    @property
    def growth(self) -> int:
        """Bytes by which it grew at most."""
        return self._most - self._before

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            self._most = max(self._most, self._daemon.rss_bytes)


@contextmanager
def _hub(folder: Path) -> Iterator[str]:
    """A hub in a process of its own; its URL."""
    model = _write_model(folder / "model")
    command = [sys.executable, "-m", "tests.hub", "--repo", f"{REPO}={model}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None:
                raise RuntimeError("no pipe")
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def _write_model(folder: Path) -> Path:
    """Valid safetensors whose bytes do not compress; no architecture, for nobody loads them."""
    folder.mkdir()
    shards = [f"model-{n + 1:05}-of-{SHARDS:05}.safetensors" for n in range(SHARDS)]
    weight_map = {f"w{n}": shard for n, shard in enumerate(shards)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    for name, shard in weight_map.items():
        tensor = {"dtype": "U8", "shape": [SHARD_BYTES], "data_offsets": [0, SHARD_BYTES]}
        header = json.dumps({name: tensor}).encode()
        with (folder / shard).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for _ in range(SHARD_BYTES >> 20):
                file.write(os.urandom(1 << 20))
    return folder
