"""What random requests are sent to, and how to see that it is none the worse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
from google.protobuf.descriptor import MethodDescriptor
from hypothesis import HealthCheck, Phase, settings

from loaderd.client import Client, Lease, Model, ModelState
from tests.daemon import SpawnedDaemon
from tests.integration.fuzz.messages import Known

GROWTH_MIB = 48
"""Of the daemon and the model's worker each, by all requests after as many that warmed them up."""

DRAWN = settings(
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
"""Requests come from a seed, each is sent once: a hurt daemon is no place to shrink them."""


@dataclass(frozen=True)
class Target:
    """A daemon, with a model that every client may use and one that may be unloaded."""

    daemon: SpawnedDaemon
    channel: grpc.Channel
    client: Client
    lease: Lease
    other: Path

    @property
    def model(self) -> Model:
        """The model that stays."""
        return self.lease.model

    def worker_pid(self) -> int:
        """The process that serves the model, which must be there."""
        model = self.client.model(self.model.id)
        assert model.state is ModelState.READY
        assert model.details is not None
        return model.details.worker_pid

    def unload_others(self) -> None:
        """Leaves the model alone."""
        for left in self.client.models():
            if left.id != self.model.id:
                left.unload(force=True)

    def known(self, method: MethodDescriptor) -> Known:
        """What a method's fields may name."""
        names = ["org/name", "org/name@main", "m:000000000000", str(self.other.parent)]
        if method.name in {"LoadModel", "UnloadModel"}:
            names = [*names * 3, str(self.other)]
        else:
            names = [self.model.id] * 12 + [self.model.name] * 2 + names
        return {
            "model": names,
            "models": names,
            "text": ["The sky is blue"],
            "role": ["user", "system", "assistant"],
            "ids": [1, 2, 40],
            "token_ids": [1, 2, 40],
            "service": ["", self.model.name, "loaderd.v1.ModelService"],
            "lease_id": ["0" * 32] if method.name == "ReleaseLease" else [self.lease.id],
            "ttl": [(1, 0), (86_400, 0), (86_401, 0), (0, 1), (-1, 0), (2**63 - 1, 0)],
        }

    def memory_mib(self) -> dict[str, float]:
        """What its processes hold."""
        held = {"daemon": self.daemon.rss_bytes}
        held["worker"] = psutil.Process(self.worker_pid()).memory_info().rss
        return {name: size / 2**20 for name, size in held.items()}


def check_growth(before: Mapping[str, float], after: Mapping[str, float]) -> None:
    """Fails if what the processes hold has grown."""
    for name, size in before.items():
        assert after[name] < size + GROWTH_MIB, (name, before, after)
