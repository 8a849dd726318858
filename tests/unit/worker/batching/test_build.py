from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaderd.server.worker import devices
from loaderd.server.worker.engine.batching.build import EngineSettings, _memory, _sizes
from loaderd.server.worker.engine.batching.kernels import PLAIN
from loaderd.server.worker.engine.batching.kv_cache import BLOCK
from loaderd.server.worker.engine.batching.suitability import UnsuitableError
from loaderd.server.worker.engine.batching.trials import Outcome, Way

SETTINGS = EngineSettings()


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.booleans())
def test_slots_and_their_spare_places_are_no_more_than_there_is(
    tokens: int, context: int, spare: bool
) -> None:
    blocks, capacity = _sizes(tokens, context, SETTINGS, lazy=False, spare=spare)
    places = capacity.slots * (capacity.slot_tokens + spare)
    assert places + blocks * BLOCK <= tokens
    assert capacity.tokens == capacity.slots * capacity.slot_tokens
    if tokens - blocks * BLOCK > 1:
        assert capacity.slots > 0
        assert capacity.slot_tokens > 0


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What the devices have."""
    free = {"cpu": 2**40, "cuda:0": 3 * 2**30, "cuda:1": 2**30}
    monkeypatch.setattr(devices, "free_bytes", free.__getitem__)
    return free


def tried(first: int, second: int) -> Outcome:
    by_device = {"cuda:0": first, "cuda:1": second}
    sizes = {device: size for device, size in by_device.items() if size}
    return Outcome(sizes, {}, has_kernels=False, way=Way.FLAT, linears=PLAIN)


@pytest.mark.parametrize(
    ("first", "second", "tokens"),
    [
        (2**10, 0, 3 * 2**19),
        (2**10, 2**10, 2**19),  # the second one has less
        (2**10, 2**8, 3 * 2**19),
        (2**18, 0, 3 * 2**11),
    ],
)
def test_the_fullest_device_says_how_many_tokens_there_are(
    free: dict[str, int], first: int, second: int, tokens: int
) -> None:
    cache, capacity = _memory(tried(first=first, second=second), 0, SETTINGS, spare=True)
    used = capacity.slots * (capacity.slot_tokens + 1) + cache.blocks * BLOCK
    assert 0.8 * tokens < used <= tokens
    assert cache.spare_place == capacity.slot_tokens


def test_a_bound_of_a_device_counts_what_is_held_already(
    free: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "held_bytes", lambda: {"cuda:0": 2**29})
    bounded = EngineSettings(max_device_bytes={"cuda:0": 2**30, "cuda:1": 2**40, "cpu": 5})
    rooms = {device: bounded.room(device) for device in free}
    assert rooms == {"cpu": 5, "cuda:0": 2**29, "cuda:1": 2**29}
    assert EngineSettings(max_device_bytes={"cuda:0": 3}).room("cuda:0") == 0


def test_an_accelerator_with_enough_memory_has_room_for_all_slots(free: dict[str, int]) -> None:
    free["cuda:0"] = 2**40
    cache, capacity = _memory(tried(first=2**17, second=0), 2**17, SETTINGS, spare=True)
    assert (capacity.slots, capacity.slot_tokens) == (SETTINGS.max_slots, SETTINGS.slot_tokens)
    assert cache.blocks * BLOCK <= capacity.tokens / 3 + BLOCK


def test_memory_that_no_slot_can_use_is_not_taken_for_prompts(free: dict[str, int]) -> None:
    cache, capacity = _memory(tried(first=2**10, second=0), 256, SETTINGS, spare=True)
    assert (capacity.slots, capacity.slot_tokens) == (SETTINGS.max_slots, 256)
    assert cache.blocks * BLOCK <= capacity.tokens / 3 + BLOCK


def test_memory_of_other_devices_does_not_help(free: dict[str, int]) -> None:
    free["cuda:0"] = 100
    with pytest.raises(UnsuitableError, match="too little memory"):
        _memory(tried(first=2**10, second=0), 0, SETTINGS, spare=True)
