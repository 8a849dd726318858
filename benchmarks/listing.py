"""How long a listing of a large cache takes."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from rich.table import Table

from loaderd.client import Client
from tests.daemon import SpawnedDaemon
from tests.unit.store.caches import SMALL_MODEL, made_up_repo, safetensors

REPOS = 200
SNAPSHOTS = 10  # of each repository
_CALLS = 20
_BAR_MS = 100


def measure_listing() -> Table:
    """ListSnapshots through the SDK: the daemon's first one, later ones, each after a change."""
    with (
        tempfile.TemporaryDirectory(prefix="listing-") as folder,
        SpawnedDaemon(Path(folder), ["--standby", "0"], {"LOADERD_LOG_LEVEL": "warning"}) as daemon,
        Client(daemon.address) as client,
    ):
        build_cache(daemon.cache_dir)
        cold = _time_listing(client)
        warm = [_time_listing(client) for _ in range(_CALLS)]
        changed = []
        for number in range(_CALLS):
            repo = made_up_repo(daemon.cache_dir, f"org/model-{number}")
            repo.add({"config.json": b"{}"}, commit="f" * 40, refs=())
            changed.append(_time_listing(client))
    title = f"ListSnapshots, {REPOS} repositories, {REPOS * SNAPSHOTS} snapshots, ms"
    table = Table("", "median", "worst", "bar", title=title)
    table.add_row("first", f"{cold:.0f}", "", "")
    table.add_row("again", f"{statistics.median(warm):.0f}", f"{max(warm):.0f}", f"{_BAR_MS}")
    table.add_row(
        "after one changed", f"{statistics.median(changed):.0f}", f"{max(changed):.0f}", ""
    )
    return table


def build_cache(cache_dir: Path) -> None:
    """Snapshots of five files each; three of them are shared by all of a repository."""
    for number in range(REPOS):
        repo = made_up_repo(cache_dir, f"org/model-{number}")
        for update in range(SNAPSHOTS):
            files = SMALL_MODEL | {
                "model.safetensors": safetensors(1000 + update),
                "README.md": f"update {update}".encode(),
            }
            refs = ("main",) if update == SNAPSHOTS - 1 else ()
            repo.add(files, commit=f"{update:040x}", refs=refs, listing=files)


def _time_listing(client: Client) -> float:
    started = time.perf_counter()
    found = client.cache.snapshots()
    elapsed_ms = (time.perf_counter() - started) * 1000
    if len(found) < REPOS * SNAPSHOTS:
        raise RuntimeError(f"only {len(found)} snapshots were listed")
    return elapsed_ms
