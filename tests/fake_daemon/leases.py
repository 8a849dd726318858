"""The fake's leases, which nobody lets expire."""

from __future__ import annotations

import itertools
import threading

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from loaderd.v1 import model_pb2
from tests.fake_daemon.failure import FailureError


class Leases:
    """By id."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._leases: dict[str, model_pb2.Lease] = {}

    def acquire(self, model_id: str, ttl: Duration) -> model_pb2.Lease:
        if not 1 <= ttl.ToTimedelta().total_seconds() <= 86400:
            raise FailureError("INVALID_ARGUMENT", field="ttl", problem="from a second to a day")
        with self._lock:
            lease = model_pb2.Lease(id=f"lease-{next(self._numbers)}", model_id=model_id, ttl=ttl)
            self._leases[lease.id] = lease
            return self.renew(lease.id)

    def renew(self, lease_id: str, model_id: str | None = None) -> model_pb2.Lease:
        with self._lock:
            lease = self._leases.get(lease_id)
            if lease is None or model_id not in {None, lease.model_id}:
                raise FailureError("LEASE_NOT_FOUND", lease=lease_id)
            now = Timestamp()
            now.GetCurrentTime()
            lease.expires_at.FromNanoseconds(now.ToNanoseconds() + lease.ttl.ToNanoseconds())
            return lease

    def release(self, lease_id: str) -> None:
        with self._lock:
            del self._leases[self.renew(lease_id).id]

    def of(self, model_id: str) -> int:
        with self._lock:
            return sum(lease.model_id == model_id for lease in self._leases.values())

    def drop(self, model_id: str) -> None:
        with self._lock:
            for lease in [each for each in self._leases.values() if each.model_id == model_id]:
                del self._leases[lease.id]
