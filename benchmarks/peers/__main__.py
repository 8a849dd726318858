"""`python -m benchmarks.peers`: loaderd and what people would pick instead, in one run."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import signal
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import psutil
import torch
from rich.console import Console

from benchmarks.figures import Figures, medians
from benchmarks.peers.installation import FOLDER
from benchmarks.peers.peers import PEERS
from benchmarks.peers.plots import draw
from benchmarks.peers.results import Results, ServerResult
from benchmarks.peers.servers import DTYPE, Loaderd, Server
from benchmarks.prompts import Prompts
from benchmarks.streams import MODEL, integers, run_load, warm_up

_IMAGES = Path("docs/images")
_IDLE_SECONDS = 3.0
console = Console()


def main() -> None:
    """Installs what is asked for, measures, and writes table, JSON and pictures."""
    options = _arguments()
    if options.draw is not None:
        _tell(Results.read(options.draw), options.images)
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in options.peers:
        PEERS[name].installation.install()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the servers end with this process
    results = asyncio.run(_measure(options))
    results.save(options.json)
    options.json.with_suffix(".md").write_text(results.markdown())
    _tell(results, options.images)


def _tell(results: Results, images: Path) -> None:
    for name, value in results.setting.items():
        console.print(f"{name}: {value}", highlight=False)
    console.print(results.table())
    for path in draw(results, images):
        console.print(f"drawn: {path}")


async def _measure(options: argparse.Namespace) -> Results:
    """All servers are there for the whole run, and are asked in turn, in each round."""
    servers = _servers(options)
    async with AsyncExitStack() as stack:
        ready = [await _start(server, stack) for server in servers]
        prompts = [Prompts() for _ in servers]
        for server, texts in zip(servers, prompts, strict=True):
            for streams in options.streams:
                await warm_up(server.read, texts.take(streams))
            console.print(f"{server.name} is warm")
        idle = await _idle_cpu(servers)
        taken: dict[tuple[str, int], list[Figures]] = {}
        for number in range(options.rounds):
            for streams in options.streams:
                for server, texts in zip(servers, prompts, strict=True):
                    figures = await run_load(server.read, texts.take(streams), options.tokens)
                    taken.setdefault((server.name, streams), []).append(figures)
            console.print(f"round {number + 1} of {options.rounds} is done")
    rows = [
        ServerResult(
            name=server.name,
            ready_seconds=seconds,
            idle_cpu=cores,
            loads=[medians(taken[server.name, streams]) for streams in options.streams],
        )
        for server, seconds, cores in zip(servers, ready, idle, strict=True)
    ]
    return Results(_setting(options, rows), rows)


def _servers(options: argparse.Namespace) -> list[Server]:
    environment = {}
    if options.spin_count is not None:
        environment["GOMP_SPINCOUNT"] = str(options.spin_count)
    model = options.model.absolute()
    servers: list[Server] = [Loaderd(model, environment)]
    for name, peer in PEERS.items():
        if options.peers and name not in options.peers:
            continue
        if not peer.installation.is_complete:
            console.print(f'{name}: skipped; make bench-peers PEERS="{name}" installs it')
            continue
        most = max(options.streams)
        servers += [server(model, environment, most) for server in peer.servers]
    return servers


async def _start(server: Server, stack: AsyncExitStack) -> float:
    begin = time.perf_counter()
    await server.start()
    stack.push_async_callback(server.stop)
    seconds = time.perf_counter() - begin
    console.print(f"{server.name} is ready after {seconds:.1f} s")
    return seconds


async def _idle_cpu(servers: Sequence[Server]) -> list[float]:
    """Cores that each keeps busy when it has nothing to do, at the cost of the others."""
    await asyncio.sleep(1)
    before = [server.cpu_seconds() for server in servers]
    await asyncio.sleep(_IDLE_SECONDS)
    after = [server.cpu_seconds() for server in servers]
    return [(end - begin) / _IDLE_SECONDS for begin, end in zip(before, after, strict=True)]


def _setting(options: argparse.Namespace, rows: Sequence[ServerResult]) -> dict[str, str]:
    openmp = "each server's default (loaderd's workers: GOMP_SPINCOUNT=10000)"
    if options.spin_count is not None:
        openmp = f"GOMP_SPINCOUNT={options.spin_count} for all"
    elif "GOMP_SPINCOUNT" in os.environ:
        openmp = f"GOMP_SPINCOUNT={os.environ['GOMP_SPINCOUNT']} for all"
    return {
        "machine": f"{_processor()}, {psutil.cpu_count()} cores, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB, Python {platform.python_version()}, "
        f"torch {torch.__version__}",
        "model": f"{options.model.name}, {DTYPE}",
        "request": f"greedy, {options.tokens} new tokens, median of {options.rounds} rounds",
        "OpenMP": openmp,
        "cores busy while idle": ", ".join(f"{row.name} {row.idle_cpu:.2f}" for row in rows),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(line.split(": ")[1] for line in lines if line.startswith("model name"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument(
        "peers",
        nargs="*",
        metavar="PEER",
        help=f"of {', '.join(PEERS)}: installed if missing"
        " and measured (default: those that are installed)",
    )
    parser.add_argument("--model", type=Path, default=MODEL, help=f"folder ({MODEL.name})")
    parser.add_argument("--streams", type=integers, default=[1, 8, 32], help="loads (1,8,32)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each stream (64)")
    parser.add_argument("--rounds", type=int, default=3, help="medians of them count (3)")
    parser.add_argument("--spin-count", type=int, help="GOMP_SPINCOUNT for all servers")
    parser.add_argument(
        "--json", type=Path, default=FOLDER / "results.json", help="where the results go"
    )
    parser.add_argument("--images", type=Path, default=_IMAGES, help=f"pictures ({_IMAGES})")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="only draw an earlier run")
    options = parser.parse_args()
    unknown = set(options.peers) - PEERS.keys()
    if unknown:
        parser.error(f"no such peer: {', '.join(unknown)}; there are {', '.join(PEERS)}")
    return options


if __name__ == "__main__":
    main()
