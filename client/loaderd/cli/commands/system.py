"""Commands on the daemon and its box: info, health, devices."""

from __future__ import annotations

from typing import Annotated

import typer

from loaderd.cli import options, output
from loaderd.cli.exits import ExitCode
from loaderd.cli.session import session_of
from loaderd.cli.units import size, span


def info(context: typer.Context, json: options.Json = False) -> None:
    """Show the daemon's version, settings and abilities."""
    session = session_of(context)
    with session.connect() as client:
        server = client.info(timeout=session.timeout)
        address = client.address
    if json:
        output.json_result(server)
        return
    output.fields(
        [
            ("version", server.version),
            ("address", address),
            ("process", str(server.pid)),
            ("uptime", span(server.uptime)),
            ("state", "draining" if server.draining else "serving"),
            ("cache", server.cache_dir),
            ("local roots", ", ".join(server.local_roots) or "none"),
            ("hub", server.hub_endpoint + (" (offline)" if server.offline else "")),
            ("standby workers", str(server.standby_workers)),
            ("capabilities", ", ".join(server.capabilities) or "none"),
            *((f"{name} version", version) for name, version in sorted(server.versions.items())),
        ]
    )


def health(
    context: typer.Context,
    service: Annotated[
        str,
        typer.Argument(
            metavar="SERVICE",
            help="A gRPC service, or a model's name or id. Default: the daemon as a whole.",
            show_default=False,
        ),
    ] = "",
    json: options.Json = False,
) -> None:
    """Say whether the daemon, a service or a model serves; the exit code is 0 only if it does."""
    from loaderd.client import HealthStatus

    session = session_of(context)
    with session.connect() as client:
        status = client.health(service, timeout=session.timeout)
    if json:
        output.json_result({"service": service, "status": status})
    else:
        output.result(status.name.lower().replace("_", " "))
    if status is HealthStatus.SERVICE_UNKNOWN:
        raise typer.Exit(ExitCode.NOT_FOUND)
    if status is not HealthStatus.SERVING:
        raise typer.Exit(ExitCode.UNAVAILABLE)


def devices(context: typer.Context, json: options.Json = False) -> None:
    """List the accelerators and the CPU of the daemon's box, and who has their memory."""
    session = session_of(context)
    with session.connect() as client:
        found = client.devices(timeout=session.timeout)
    if json:
        output.json_result(found)
        return
    output.table(
        ("ID", "TYPE", "NAME", "MEMORY", "FREE", "RESERVED", "AVAILABLE", "CORES"),
        (
            (
                device.id,
                device.type.name.lower(),
                device.name,
                size(device.total_bytes),
                size(device.free_bytes),
                size(device.reserved_bytes),
                size(device.available_bytes),
                str(device.cores or "-"),
            )
            for device in found
        ),
    )
    for device in found:
        for holder in device.holders:
            output.result(f"{device.id}: {size(holder.bytes)} {holder.name} ({holder.model_id})")
