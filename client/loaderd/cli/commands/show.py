"""The command show: everything of one model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from loaderd.cli import options, output
from loaderd.cli.session import session_of
from loaderd.cli.units import age, brief, count, size
from loaderd.cli.words import devices, name, replicas_of, steps, until

if TYPE_CHECKING:
    from loaderd.client import ModelDetails, ModelInfo, ModelStatistics, Replica


def show(context: typer.Context, model: options.LoadedModel, json: options.Json = False) -> None:
    """Show what is known of a model that is loaded, loading or failed."""
    session = session_of(context)
    with session.connect() as client:
        info = client.model(model, timeout=session.timeout).info
    if json:
        output.json_result(info)
    else:
        output.fields(_fields(info))


def _fields(model: ModelInfo) -> list[tuple[str, str]]:
    total = model.timings.total
    return [
        ("name", model.name),
        ("id", model.id),
        ("state", name(model.state)),
        *([("failure", model.failure.message)] if model.failure else []),
        ("source", name(model.source)),
        ("commit", model.commit or "-"),
        *(_details(model.details, devices(model)) if model.details else []),
        ("replicas", replicas_of(model)),
        *((f"replica {each.number}", _replica(each)) for each in model.replicas),
        ("ready", age(model.ready_at)),
        *([("loaded in", brief(total))] if total is not None else []),
        ("steps", steps(model.timings) or "-"),
        ("requests", str(model.active_requests)),
        ("until", until(model)),
        *(_statistics(model.statistics) if model.statistics else []),
    ]


def _replica(replica: Replica) -> str:
    return (
        f"process {replica.worker_pid} holds {size(replica.memory_bytes)} now, "
        f"{replica.running_requests} running, {replica.queued_requests} queued"
        + (", leaving" if replica.leaving else "")
    )


def _details(details: ModelDetails, places: str) -> list[tuple[str, str]]:
    return [
        ("architecture", details.architecture),
        ("dtype", f"{name(details.dtype)}: {details.dtype_reason}"),
        *([("quantization", name(details.quantization))] if details.quantization else []),
        ("devices", places),
        ("weights", f"{size(details.weight_bytes)}, {details.parameter_count:,} numbers"),
        ("memory", _memory(details)),
        ("context", count(details.context_length, "token") if details.context_length else "any"),
        ("engine", f"{details.engine}: {details.engine_reason}"),
        ("process", str(details.worker_pid)),
    ]


def _memory(details: ModelDetails) -> str:
    return f"{size(details.planned_bytes)} planned, {size(details.memory_bytes)} taken by its load"


def _statistics(figures: ModelStatistics) -> list[tuple[str, str]]:
    kept = f"{figures.cached_prompt_tokens:,} from the prefix cache"
    out = f"{figures.generated_tokens:,}, {figures.generated_tokens_per_second:.1f}/s"
    prompts = f"{figures.prompt_tokens:,}, {figures.prompt_tokens_per_second:.1f}/s, {kept}"
    told = [("prompt tokens", prompts), ("generated tokens", out)]
    if figures.kv_capacity_tokens is not None:
        memory = f"{figures.kv_tokens:,} of {figures.kv_capacity_tokens:,} tokens"
        told.append(("keys and values", memory))
    return told
