"""The command top: what the daemon does, now and again."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from loaderd.cli import options, output
from loaderd.cli.session import session_of
from loaderd.cli.units import count, parse_span, size, span
from loaderd.cli.words import name, replicas_of, until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from loaderd.client import Client, Device, ModelInfo, ServerInfo

_SHORTEST, _LONGEST = timedelta(seconds=1), timedelta(hours=1)

_MODELS = (
    *("NAME", "ID", "STATE", "REPLICAS", "ENGINE", "RUNNING", "QUEUED"),
    *("IN/S", "OUT/S", "KV", "PREFIX HITS", "UNTIL"),
)
_DEVICES = ("DEVICE", "TOTAL", "RESERVED", "TAKEN", "FREE")


@dataclass(frozen=True)
class Sample:
    """What there is to know at one moment."""

    daemon: ServerInfo
    models: Sequence[ModelInfo]
    devices: Sequence[Device]


def parse_interval(text: str) -> timedelta:
    """A time span from a second to an hour.

    Raises:
        ValueError: It is none; the text says how to write one.
    """
    interval = parse_span(text)
    if not _SHORTEST <= interval <= _LONGEST:
        raise ValueError(f"{text!r} is not from 1s to 1h")
    return interval


def top(
    context: typer.Context,
    interval: Annotated[
        timedelta,
        typer.Option(
            parser=options.parser(parse_interval),
            metavar="SPAN",
            help="How long to wait before it looks again, from 1s to 1h.",
        ),
    ] = "2s",  # type: ignore[assignment]  # typer parses it
    once: Annotated[bool, typer.Option("--once", help="Look once, print it, and end.")] = False,
    json: options.Json = False,
) -> None:
    """Show what models, devices and the daemon do, until Ctrl-C; with --json one object a line."""
    session = session_of(context)
    with session.connect() as client:
        if once:
            sample = _sample(client, session.timeout)
            output.json_result(sample) if json else _print(sample)
            return
        try:
            if json or not sys.stdout.isatty():
                _keep_printing(client, session.timeout, interval, json=json)
            else:
                _keep_drawing(client, session.timeout, interval)
        except KeyboardInterrupt:
            pass  # as it is meant to end


def _sample(client: Client, timeout: float | None) -> Sample:
    return Sample(
        client.info(timeout=timeout),
        [model.info for model in client.models(timeout=timeout)],
        client.devices(timeout=timeout),
    )


def _keep_printing(
    client: Client, timeout: float | None, interval: timedelta, *, json: bool
) -> None:
    while True:
        sample = _sample(client, timeout)
        if json:
            output.json_line(sample)
        else:
            _print(sample)
            output.result("")
        time.sleep(interval.total_seconds())


def _keep_drawing(client: Client, timeout: float | None, interval: timedelta) -> None:
    from rich.live import Live

    first = _picture(_sample(client, timeout))
    with Live(first, console=output.console(), auto_refresh=False) as live:
        while True:
            time.sleep(interval.total_seconds())
            live.update(_picture(_sample(client, timeout)), refresh=True)


def _print(sample: Sample) -> None:
    output.result(_heading(sample.daemon))
    output.table(_MODELS, map(_model_row, sample.models))
    output.table(_DEVICES, map(_device_row, sample.devices))


def _picture(sample: Sample) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    return Group(
        Text(_heading(sample.daemon)),
        Text(),
        output.grid(_MODELS, map(_model_row, sample.models)),
        Text(),
        output.grid(_DEVICES, map(_device_row, sample.devices)),
    )


def _heading(daemon: ServerInfo) -> str:
    parts = [
        f"loaderd {daemon.version}",
        f"up {span(daemon.uptime)}",
        count(daemon.active_requests, "request"),
        count(daemon.clients, "client"),
        count(daemon.standby_workers, "standby worker"),
        *(["draining"] if daemon.draining else []),
    ]
    return ", ".join(parts)


def _model_row(model: ModelInfo) -> tuple[str, ...]:
    engine = model.details.engine if model.details else "-"
    return (
        *(model.name, model.id, name(model.state), replicas_of(model), engine),
        *_figures(model),
        until(model),
    )


def _figures(model: ModelInfo) -> tuple[str, ...]:
    """Running, queued, tokens in and out, memory of keys and values, and what was cached."""
    figures = model.statistics
    if figures is None:
        return ("-",) * 6
    return (
        str(figures.running_requests),
        str(figures.queued_requests),
        f"{figures.prompt_tokens_per_second:.1f}",
        f"{figures.generated_tokens_per_second:.1f}",
        _percent(figures.kv_tokens, figures.kv_capacity_tokens),
        _percent(figures.cached_prompt_tokens, figures.prompt_tokens),
    )


def _percent(part: int, whole: int | None) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _device_row(device: Device) -> tuple[str, ...]:
    return (
        device.id,
        size(device.total_bytes),
        size(device.reserved_bytes),
        size(device.taken_bytes),
        size(device.free_bytes),
    )
