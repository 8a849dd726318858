"""What a run measured, and how it is written down."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.figures import Figures
from benchmarks.streams import table_of


@dataclass(frozen=True)
class ServerResult:
    """One server's part.

    Attributes:
        name: What it is called.
        ready_seconds: From its start until it answered.
        idle_cpu: Cores that it kept busy while nobody asked it anything.
        loads: Figures for each number of streams, in the order that they were taken.
    """

    name: str
    ready_seconds: float
    idle_cpu: float
    loads: list[Figures]

    def at(self, streams: int) -> Figures:
        """The figures for this number of streams."""
        return next(load for load in self.loads if load.streams == streams)


@dataclass(frozen=True)
class Results:
    """A whole run.

    Attributes:
        setting: Machine, model and options, in words.
        servers: The first is loaderd.
    """

    setting: dict[str, str]
    servers: list[ServerResult]

    @property
    def streams(self) -> list[int]:
        """The loads."""
        return [load.streams for load in self.servers[0].loads]

    def save(self, path: Path) -> None:
        """Writes JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def read(path: Path) -> Results:
        """Reads what `save` wrote."""
        content: dict[str, Any] = json.loads(path.read_text())
        servers = [
            ServerResult(**{**server, "loads": [Figures(**load) for load in server["loads"]]})
            for server in content["servers"]
        ]
        return Results(setting=content["setting"], servers=servers)

    def table(self) -> Table:
        """For a terminal: by load, so that the servers stand together."""
        rows = [(each.name, each.at(streams)) for streams in self.streams for each in self.servers]
        return table_of(f"{self.setting['model']}, {self.setting['request']}", rows)

    def markdown(self) -> str:
        """For a document: tokens/s, and what loaderd has of it beside the others."""
        loads = self.streams
        heads = [
            "",
            "start to ready",
            *(f"{streams} stream{'s'[: streams - 1]}" for streams in loads),
        ]
        lines = ["Tokens/s (how many times as many loaderd makes):", "", *_table_head(heads)]
        ours = self.servers[0]
        for server in self.servers:
            cells = []
            for streams in loads:
                speed = server.at(streams).tokens_per_second
                ratio = ours.at(streams).tokens_per_second / speed if speed else 0.0
                cells.append(f"{speed:.0f}" + ("" if server is ours else f" ({ratio:.2f} x)"))
            lines.append(_row([server.name, f"{server.ready_seconds:.1f} s", *cells]))
        for title, quantity in (
            ("Time to first token, ms: p50 / p99", "first_token"),
            ("Time between tokens, ms: p50 / p99", "inter_token"),
        ):
            lines += ["", f"{title}:", "", *_table_head(["", *heads[2:]])]
            for server in self.servers:
                cells = [_percentiles(server.at(streams), quantity) for streams in loads]
                lines.append(_row([server.name, *cells]))
        return "\n".join(lines) + "\n"


def _percentiles(figures: Figures, quantity: str) -> str:
    p50, p99 = (getattr(figures, f"{quantity}_{percentile}") for percentile in ("p50", "p99"))
    return f"{1000 * p50:.0f} / {1000 * p99:.0f}"


def _table_head(heads: list[str]) -> list[str]:
    return [_row(heads), "|---" * len(heads) + "|"]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")
