"""A wall clock that jumps: time-outs, keep-alives and leases go by the monotonic one."""

from __future__ import annotations

import sys
import time
from datetime import datetime, timedelta, tzinfo
from types import SimpleNamespace

import pytest
from google.protobuf.duration_pb2 import Duration

from loaderd.v1 import model_pb2
from tests.unit.server.box import Box
from tests.waiting import until_in_loop


def set_clock(monkeypatch: pytest.MonkeyPatch, ahead: timedelta) -> None:
    """Has all modules of the daemon read another time of day."""

    class Jumped(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + ahead

    # Not that of gRPC, which reckons with it on the way to its core's own clock.
    jumped = SimpleNamespace(**vars(time))
    jumped.time = lambda: time.time() + ahead.total_seconds()
    for name, module in list(sys.modules.items()):
        if name.startswith("loaderd.server."):
            for attribute, real, other in (("datetime", datetime, Jumped), ("time", time, jumped)):
                if vars(module).get(attribute) is real:
                    monkeypatch.setattr(module, attribute, other)


@pytest.mark.parametrize("years", [-20, 20])
async def test_a_clock_that_jumps_ends_nothing_early_and_nothing_late(
    box: Box, monkeypatch: pytest.MonkeyPatch, years: int
) -> None:
    async def hold(seconds: int) -> str:
        request = model_pb2.AcquireLeaseRequest(
            model=str(box.folder), ttl=Duration(seconds=seconds)
        )
        return str((await box.models.AcquireLease(request, timeout=30)).lease.id)

    await box.load()
    stream = box.stream("hang", timeout=60)
    await anext(aiter(stream))
    await hold(1)
    long = await hold(60)

    set_clock(monkeypatch, timedelta(days=365 * years))

    (model,) = await box.list()
    assert (model.state, model.active_requests) == (model_pb2.MODEL_STATE_READY, 1)
    renewed = await box.models.RenewLease(model_pb2.RenewLeaseRequest(lease_id=long), timeout=30)
    assert renewed.lease.expires_at.ToDatetime().year - datetime.now().year in {years, years + 1}
    await until_in_loop(lambda: box.registry.views()[0].active_leases == 1)  # the short one ends

    request = model_pb2.LoadModelRequest(model=str(box.folder), keep_alive=Duration(nanos=10**8))
    async for _ in box.models.LoadModel(request, timeout=30):
        pass
    stream.cancel()
    await box.models.ReleaseLease(model_pb2.ReleaseLeaseRequest(lease_id=long), timeout=30)
    await until_in_loop(lambda: not box.registry.views())  # nobody uses it any more
