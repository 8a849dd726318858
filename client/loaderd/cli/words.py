"""Models in words: what several commands say of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import TYPE_CHECKING

from loaderd.cli.units import brief, count, span

if TYPE_CHECKING:
    from loaderd.client import LoadTimings, ModelEvent, ModelInfo

_CHANGES = {
    "idle": "nobody used it",
    "evicted": "another model needs its memory",
    "forgotten": "it had failed",
    "shutdown": "the daemon shuts down",
}
"""What a reason means, where its name and the states do not say it."""

_STEPS = ("resolve", "download", "verify", "placement", "worker", "weights", "engine")


def name(member: Enum) -> str:
    """An enumeration's member, as in JSON."""
    return member.name.lower()


def devices(model: ModelInfo) -> str:
    """Where a model is, all replicas of it."""
    of_replicas = {device for replica in model.replicas for device in replica.devices}
    of_model = set(model.details.device_map.values()) if model.details else set()
    return "+".join(sorted(of_replicas | of_model))


def replicas_of(model: ModelInfo) -> str:
    """How many replicas serve, and how many are to, if that differs."""
    serving = sum(not replica.leaving for replica in model.replicas)
    if serving == model.wanted_replicas:
        return str(serving)
    return f"{serving} of {model.wanted_replicas}"


def until(model: ModelInfo) -> str:
    """How long a model stays if nobody uses it."""
    if model.active_leases:
        return count(model.active_leases, "lease")
    if model.keep_alive < timedelta():
        return "pinned"
    if model.expires_at is None:
        return "-"
    return f"in {span(model.expires_at - datetime.now(UTC))}"


def steps(timings: LoadTimings) -> str:
    """Where a load's time went: "weights 210 ms, engine 1.2 s"; empty if nowhere to speak of."""
    taken = {step: getattr(timings, step) for step in _STEPS}
    return ", ".join(
        f"{step} {brief(time)}"
        for step, time in taken.items()
        if time is not None and time >= timedelta(milliseconds=1)
    )


def change(event: ModelEvent) -> str:
    """A change of state, how long the state before was, and why."""
    model = event.model
    text = name(model.state)
    if event.previous_state:
        text = f"{name(event.previous_state)} -> {text}"
    if event.previous_duration is not None:
        text += f" after {brief(event.previous_duration)}"
    text += f", {name(event.reason)}"
    return f"{model.name} ({model.id}): {text}" + (f": {why}" if (why := _why(event)) else "")


def _why(event: ModelEvent) -> str:
    if name(event.reason) in {"replicas", "worker_died"}:
        return f"{replicas_of(event.model)} serve"
    if event.model.failure:
        return event.model.failure.message
    if name(event.model.state) == "ready" and event.model.timings.total is not None:
        parts = steps(event.model.timings)
        return f"{brief(event.model.timings.total)} in all" + (f" ({parts})" if parts else "")
    return _CHANGES.get(name(event.reason), "")
