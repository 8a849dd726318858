"""A daemon without models: all services of loaderd.v1 and grpc.health.v1, deterministic."""

from tests.fake_daemon.daemon import FakeDaemon
from tests.fake_daemon.record import Seen

__all__ = ["FakeDaemon", "Seen"]
