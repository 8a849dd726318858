"""Commands on models in memory: load, plan, unload, ps, watch."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from loaderd.cli import options, output, placement
from loaderd.cli.exits import ExitCode
from loaderd.cli.progress import progress_display
from loaderd.cli.session import session_of
from loaderd.cli.units import age, count, parse_span, size, span
from loaderd.cli.watching import Lines, LiveTable, Objects, WatchDisplay, follow
from loaderd.cli.words import devices, name, replicas_of, steps, until

if TYPE_CHECKING:
    from loaderd.client import LoadPlan, ModelInfo


def load(
    context: typer.Context,
    model: options.Model,
    *,
    dtype: Annotated[
        options.DtypeName | None,
        typer.Option(help="Number type of the weights. Default: the daemon's choice."),
    ] = None,
    device_map: options.DeviceMap = None,
    max_memory: options.MaxMemory = None,
    offload: options.Offload = None,
    keep_alive: options.KeepAlive = None,
    quantization: Annotated[
        options.QuantizationName | None,
        typer.Option(help="Keep weights in 8 or 4 bits. Default: as the files have them."),
    ] = None,
    replicas: options.Replicas = None,
    json: options.Json = False,
) -> None:
    """Load a model, downloading what the cache lacks."""
    session = session_of(context)
    worked, began = False, time.monotonic()
    with session.connect() as client, progress_display(model) as display:
        operation = client.start_load(
            model,
            dtype=dtype.value if dtype else None,
            device_map=placement.device_map(device_map or ()),
            max_memory=placement.max_memory(max_memory or ()),
            offload=offload.value if offload else None,
            keep_alive=keep_alive,
            quantization=quantization.value if quantization else None,
            replicas=replicas,
            timeout=session.timeout,
        )
        with operation:
            for progress in operation:
                worked = True
                display.load(progress)
            info = operation.result().info
    if info.stale:
        output.message(output.STALE)
    if json:
        output.json_result(info)
    else:
        took = timedelta(seconds=time.monotonic() - began) if worked else None
        output.result(_sentence(info, took, scaled=replicas is not None))


def plan(
    context: typer.Context,
    model: options.Model,
    *,
    dtype: Annotated[
        options.DtypeName | None,
        typer.Option(help="Number type of the weights. Default: the daemon's choice."),
    ] = None,
    device_map: options.DeviceMap = None,
    max_memory: options.MaxMemory = None,
    offload: options.Offload = None,
    quantization: Annotated[
        options.QuantizationName | None,
        typer.Option(help="Keep weights in 8 or 4 bits. Default: as the files have them."),
    ] = None,
    replicas: options.Replicas = None,
    json: options.Json = False,
) -> None:
    """Say what a load would take and whether it would fit now; the exit code is 0 only if so."""
    session = session_of(context)
    with session.connect() as client:
        planned = client.plan(
            model,
            dtype=dtype.value if dtype else None,
            device_map=placement.device_map(device_map or ()),
            max_memory=placement.max_memory(max_memory or ()),
            offload=offload.value if offload else None,
            quantization=quantization.value if quantization else None,
            replicas=replicas,
            timeout=session.timeout,
        )
    if json:
        output.json_result(planned)
    else:
        output.fields(_plan_fields(planned, replicas or 1))
    if not planned.fits:
        raise typer.Exit(ExitCode.EXHAUSTED)


def unload(
    context: typer.Context,
    model: options.LoadedModel,
    force: Annotated[
        bool, typer.Option("--force", help="End requests that run on it, and leases.")
    ] = False,
    grace: Annotated[
        timedelta | None,
        typer.Option(
            parser=options.parser(parse_span),
            metavar="SPAN",
            help="With --force: how long requests may go on first, such as 30s or 5m.",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Unload a model and say how much memory that freed."""
    if grace is not None and not force:
        raise typer.BadParameter(
            "goes with --force; without it a model that is in use is not unloaded",
            param_hint="--grace",
        )
    session = session_of(context)
    with session.connect() as client:
        unloaded = client.unload(model, force=force, grace=grace, timeout=session.timeout)
    if json:
        output.json_result(unloaded)
    else:
        freed = f", {size(unloaded.freed_bytes)} freed" if unloaded.freed_bytes else ""
        output.result(f"unloaded {unloaded.model.name}{freed}")


def ps(
    context: typer.Context,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", "-w", help="Go on showing every change, until Ctrl-C; in pipes as `watch`."
        ),
    ] = False,
    json: options.Json = False,
) -> None:
    """List the models in memory."""
    session = session_of(context)
    with session.connect() as client:
        if watch:
            is_live = sys.stdout.isatty() and not json
            with suppress(KeyboardInterrupt), client.watch(timeout=session.timeout) as updates:
                follow(updates, LiveTable() if is_live else _lines(json=json))
            return
        models = [model.info for model in client.models(timeout=session.timeout)]
    if json:
        output.json_result(models)
        return
    if not models:
        output.message("no models are loaded; see `loaderctl load --help`")
        return
    columns = (
        "NAME",
        "ID",
        "STATE",
        "DTYPE",
        "DEVICE",
        "REPLICAS",
        "WEIGHTS",
        "REQUESTS",
        "READY",
        "UNTIL",
    )
    output.table(columns, map(_row, models))
    for model in models:
        if model.failure is not None:
            output.result(f"{model.name} ({model.id}) failed: {model.failure.message}")


def watch(context: typer.Context, json: options.Json = False) -> None:
    """Print every change of a model's state until interrupted; with --json one object a line."""
    session = session_of(context)
    with session.connect() as client, client.watch(timeout=session.timeout) as updates:
        follow(updates, _lines(json=json))


def _lines(*, json: bool) -> WatchDisplay:
    return Objects() if json else Lines()


def _plan_fields(plan: LoadPlan, replicas: int) -> list[tuple[str, str]]:
    parts = plan.breakdown
    sizes = [
        ("weights", parts.weights_bytes),
        (f"keys and values of {plan.kv_tokens} tokens", parts.kv_cache_bytes),
        ("activations", parts.activation_bytes),
        ("copies of weights", parts.copies_bytes),
        ("headroom", parts.headroom_bytes),
        ("needed" if replicas == 1 else f"needed by {replicas}", plan.needed_bytes),
        ("free", plan.free_bytes),
    ]
    offloaded = [
        ("in main memory, at most", plan.offloaded_cpu_bytes),
        ("on the disk, at most", plan.offloaded_disk_bytes),
    ]
    places = ", ".join(f"{device.id} ({size(device.bytes)})" for device in plan.devices)
    return [
        ("fits", f"yes, on {places}" if plan.fits else "no"),
        ("dtype", f"{name(plan.dtype)}: {plan.dtype_reason}"),
        *((name, size(bytes_)) for name, bytes_ in sizes),
        *((name, size(bytes_)) for name, bytes_ in offloaded if bytes_),
        *(("held by", f"{each.name} ({size(each.bytes)})") for each in plan.holders),
        *(("not counted", text) for text in plan.unknown),
    ]


def _sentence(model: ModelInfo, took: timedelta | None, *, scaled: bool) -> str:
    """What came of a load.

    Args:
        model: The model.
        took: How long the call took; None: there was nothing to do.
        scaled: Whether a number of replicas was asked for; what there was to do may be only that.
    """
    parts = [f"{model.name} is ready as {model.id}"]
    if (details := model.details) is not None:
        weights = f", {name(details.quantization)} weights" if details.quantization else ""
        parts.append(f"{name(details.dtype)}{weights} on {devices(model)}")
        if details.offloaded_bytes:
            parts.append(f"{size(details.offloaded_bytes)} of it offloaded")
    if scaled:
        parts.append(count(model.wanted_replicas, "replica"))
    if took is None:
        parts.append("was loaded already")
    elif _has_grown(model):
        parts.append(f"more of them loaded in {span(took)}")
    elif model.timings.total is not None:
        parts_of_it = steps(model.timings)
        told = f" ({parts_of_it})" if parts_of_it else ""
        parts.append(f"loaded in {span(model.timings.total)}{told}")
    return ", ".join(parts)


def _has_grown(model: ModelInfo) -> bool:
    """Whether replicas came after the model's load, of which alone its timings tell."""
    ready_at = model.ready_at
    return ready_at is not None and any(each.ready_at > ready_at for each in model.replicas)


def _row(model: ModelInfo) -> tuple[str, ...]:
    details = model.details
    return (
        model.name,
        model.id,
        name(model.state),
        name(details.dtype) if details else "-",
        devices(model) if details else "-",
        replicas_of(model),
        size(details.weight_bytes) if details else "-",
        str(model.active_requests),
        age(model.ready_at),
        until(model),
    )
