"""A daemon with several models in turmoil, and what is left when it is over."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.soak.soak import COMPLAINTS
from benchmarks.turmoil.clients import Clients, Outcomes
from loaderd.client import AsyncClient
from tests.daemon import SpawnedDaemon

AT_ONCE = 12
_SPARE_SHARE = 0.05
_SPARE_BYTES = 32 * 2**20
_SETTLE_S = 60.0


@dataclass(frozen=True)
class Report:
    """What a turmoil came to.

    Attributes:
        outcomes: Of what clients did.
        before_bytes: Memory of the daemon and its spare worker before.
        after_bytes: The same afterwards, with nothing loaded.
        processes: Of the daemon then, itself included; one is a spare worker.
        left: Files in its private folder that nobody needs, and processes that outlived it.
        complaints: Lines of its log that tell of defects.
        exit_code: When it was told to stop.
    """

    outcomes: Outcomes
    before_bytes: int
    after_bytes: int
    processes: int
    left: Sequence[str]
    complaints: Sequence[str]
    exit_code: int

    @property
    def problems(self) -> list[str]:
        """What must not be; empty if all is well."""
        grown = self.after_bytes - self.before_bytes
        problems = [f"{what} ({count})" for what, count in self.outcomes.defects.items()]
        problems += [f"the log: {line}" for line in self.complaints]
        problems += [f"left: {what}" for what in self.left]
        if grown > max(_SPARE_SHARE * self.before_bytes, _SPARE_BYTES):
            problems.append(f"memory grew by {grown / 2**20:.0f} MiB")
        if self.processes != 2:
            problems.append(f"{self.processes} processes with nothing loaded")
        if self.exit_code:
            problems.append(f"exit code {self.exit_code}")
        return problems


def turmoil(
    models: Sequence[Path], seconds: float, *, kill_every_s: float, seed: int = 0
) -> Report:
    """Runs clients against a daemon of its own.

    Args:
        models: Folders.
        seconds: How long.
        kill_every_s: Mean time between two kills of a worker.
        seed: Of what clients do.
    """
    arguments = [f"--allow-local={model.parent}" for model in models]
    with tempfile.TemporaryDirectory() as folder:
        runtime = Path(folder, "run")
        runtime.mkdir()
        variables = {"LOADERD_LOG_LEVEL": "info", "XDG_RUNTIME_DIR": str(runtime)}
        with SpawnedDaemon(Path(folder), arguments, variables) as daemon:
            root = psutil.Process(daemon.process.pid)
            clients = Clients(daemon, models, seed)
            run = clients.run(seconds, AT_ONCE, kill_every_s)
            before, after = asyncio.run(_bytes_around(run, daemon.address, models, root))
            family = [root, *root.children(recursive=True)]
            exit_code = daemon.stop()
            lines = daemon.log.splitlines()
        left = [f"process {each.pid}" for each in family if each.is_running()]
        left += [str(path.relative_to(runtime)) for path in runtime.rglob("*")]
    complaints = [line for line in lines if any(each in line for each in COMPLAINTS)]
    return Report(clients.outcomes, before, after, len(family), left, complaints, exit_code)


async def _bytes_around(
    run: Awaitable[None], address: str, models: Sequence[Path], root: psutil.Process
) -> tuple[int, int]:
    """Memory of the daemon's processes before and after, with nothing loaded."""
    async with AsyncClient(address) as client:
        for model in models:  # so that the daemon is as large as it gets
            await (await client.load(str(model))).unload()
        before = await _at_rest(client, root)
        await run
        await _unload_all(client)
        return before, await _at_rest(client, root)


async def _unload_all(client: AsyncClient) -> None:
    """Until nothing is loaded and nothing comes back."""
    deadline = time.monotonic() + _SETTLE_S
    while models := await client.models():
        for model in models:
            try:
                await model.unload(force=True)
            except Exception:  # it goes by itself meanwhile, or is looked at again
                if time.monotonic() > deadline:
                    raise
        await asyncio.sleep(0.1)


async def _at_rest(client: AsyncClient, root: psutil.Process) -> int:
    """Bytes of the daemon's processes once it has its spare worker and no other."""
    deadline = time.monotonic() + _SETTLE_S
    while time.monotonic() < deadline:
        info = await client.info()
        if info.standby_workers == 1 and len(root.children()) == 1:
            break
        await asyncio.sleep(0.1)
    await asyncio.sleep(1)
    return sum(each.memory_info().rss for each in (root, *root.children(recursive=True)))
