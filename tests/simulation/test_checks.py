"""A daemon that breaks its promises is found out: what the simulation checks, it sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.simulation.__main__ import simulate
from loaderd.server.models.idle import IdleModels
from loaderd.server.models.leases import Lease, Leases
from loaderd.server.models.lifecycle import ModelState
from loaderd.server.models.placement import DeviceBook
from loaderd.server.models.planner import Claim
from loaderd.server.models.record import ModelRecord
from loaderd.server.models.registry import ModelRegistry
from loaderd.server.supervisor.worker import Worker
from tests.simulation.accidents import Accidents
from tests.simulation.simulation import Simulation


def nothing(*_: Any, **__: Any) -> None:
    pass


def none(self: Leases, model_id: str) -> list[Lease]:
    return []


def all_that_are_ready(self: IdleModels, record: ModelRecord) -> bool:
    return record.state is ModelState.READY


def all_there_is(self: DeviceBook, pool: str) -> int:
    return self._devices[pool].total_bytes


async def never(self: Worker, *_: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("where", "name", "defect"),
    [
        pytest.param(IdleModels, "_is_unused", all_that_are_ready, id="evicts what is used"),
        pytest.param(DeviceBook, "_available", all_there_is, id="promises memory twice"),
        pytest.param(Claim, "release", nothing, id="keeps memory for ever"),
        pytest.param(Worker, "close", never, id="leaves workers behind"),
        pytest.param(ModelRecord, "unpin", nothing, id="keeps snapshots for ever"),
        pytest.param(Leases, "of", none, id="lets go of what is leased"),
        pytest.param(ModelRegistry, "_publish", nothing, id="tells nobody"),
    ],
)
def test_a_defect_is_found(
    where: type, name: str, defect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, defect)
    with pytest.raises(AssertionError):
        for seed in range(5):
            with Simulation("mixed cards", seed) as box:
                accidents = Accidents(box, seed)
                for _ in range(200):
                    accidents.happen()


def test_a_long_run_tells_of_each_box_in_which_something_was_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sound = simulate(events=50, seed=1, each=20)
    assert (sound.boxes, sound.happened, sound.problems) == (3, 50, [])
    assert sound.ended
    monkeypatch.setattr(Claim, "release", nothing)
    broken = simulate(events=40, seed=1, each=20)
    assert [problem.partition(",")[0] for problem in broken.problems] == [
        "seed 1 (8 x 80 GB",
        "seed 2 (mixed cards",
    ]
