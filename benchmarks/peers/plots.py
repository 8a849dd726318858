"""Draws what a run measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from benchmarks.peers.results import Results

_OURS = "#c2410c"
_OTHERS = ("#1d4ed8", "#0e7490", "#6d28d9", "#4d7c0f", "#64748b")
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "axes.axisbelow": True,
}


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes one picture of tokens/s and one of the time between tokens; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"tokens-per-second": _throughput, "inter-token": _inter_token}
    paths = []
    with pyplot.rc_context(_STYLE):
        for name, picture in pictures.items():
            figure = picture(results)
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=150, bbox_inches="tight")
            pyplot.close(figure)
            paths.append(path)
    return paths


def _colors(results: Results) -> list[str]:
    return [_OURS, *_OTHERS][: len(results.servers)]


def _throughput(results: Results) -> Any:
    figure, axes = pyplot.subplots(figsize=(7, 4))
    loads = results.streams
    for server, color in zip(results.servers, _colors(results), strict=True):
        speeds = [load.tokens_per_second for load in server.loads]
        axes.plot(loads, speeds, marker="o", color=color, label=server.name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(loads, [str(load) for load in loads])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("concurrent streams")
    axes.set_ylabel("tokens/s, all streams together")
    axes.set_title(results.setting["model"], loc="left")
    axes.legend(frameon=False)
    return figure


def _inter_token(results: Results) -> Any:
    loads, servers = results.streams, results.servers
    size = (3 * len(loads) + 2, 0.4 * len(servers) + 1.4)
    figure, panels = pyplot.subplots(
        1, len(loads), figsize=size, sharex=True, sharey=True, squeeze=False
    )
    names = [server.name.replace(" --", "\n--") for server in servers]
    for panel, streams in zip(panels[0], loads, strict=True):
        for place, (server, color) in enumerate(zip(servers, _colors(results), strict=True)):
            figures = server.at(streams)
            times = [1000 * figures.inter_token_p50, 1000 * figures.inter_token_p99]
            panel.plot(times, [place, place], color=color, linewidth=3, alpha=0.4)
            panel.plot(times[0], place, "o", color=color)
            panel.plot(times[1], place, "|", color=color, markersize=12, markeredgewidth=2)
        panel.set_title(f"{streams} stream{'s' if streams > 1 else ''}", loc="left")
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_yticks(range(len(names)), names)
        panel.set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel("milliseconds between tokens of a stream: p50 (dot) and p99 (bar)", y=-0.06)
    return figure
