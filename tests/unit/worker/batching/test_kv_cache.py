from __future__ import annotations

import mmap

import psutil
import torch

from loaderd.server.worker.engine.batching.kv_cache import BLOCK, KvCache

HEADS, DIMENSIONS = 2, 64
TOKENS = 4096


def cache_of(slots: int, *, blocks: int = 0, idle_tokens: int = 0) -> KvCache:
    cache = KvCache(slots, TOKENS, blocks, idle_tokens)
    new = torch.zeros(1, HEADS, DIMENSIONS)
    cache.layer(0, new, new)
    return cache


def buffers(cache: KvCache) -> tuple[torch.Tensor, torch.Tensor]:
    new = torch.zeros(1, HEADS, DIMENSIONS)
    layer = cache.layer(0, new, new)
    return layer.keys, layer.values


def test_what_was_kept_of_a_slot_is_taken_into_another() -> None:
    cache = cache_of(3, blocks=8)
    for buffer in buffers(cache):
        buffer[1] = torch.randn(HEADS, TOKENS, DIMENSIONS)
    cache.keep(1, BLOCK, [5, 2])
    cache.take(2, [5, 2])
    for buffer in buffers(cache):
        assert torch.equal(buffer[2, :, : 2 * BLOCK], buffer[1, :, BLOCK : 3 * BLOCK])
        assert not buffer[2, :, 2 * BLOCK :].any()
        assert not buffer[0].any()


def test_a_copy_is_as_long_as_asked_for() -> None:
    cache = cache_of(2)
    for buffer in buffers(cache):
        buffer[0] = 1.0
    cache.copy(0, 1, 7)
    for buffer in buffers(cache):
        assert buffer[1, :, :7].all()
        assert not buffer[1, :, 7:].any()


def test_a_copy_begins_where_it_is_asked_to() -> None:
    cache = cache_of(2)
    for buffer in buffers(cache):
        buffer[0] = 1.0
    cache.copy(0, 1, 7, first=5)
    for buffer in buffers(cache):
        assert not buffer[1, :, :5].any()
        assert buffer[1, :, 5:7].all()
        assert not buffer[1, :, 7:].any()


def test_tokens_have_the_size_that_they_take() -> None:
    assert cache_of(1).bytes_per_token == {torch.device("cpu"): 2 * HEADS * DIMENSIONS * 4}


def test_memory_of_free_slots_is_given_back() -> None:
    """64 slots of 4 MiB: what is only there, or free, takes nothing."""
    process = psutil.Process()
    cache = cache_of(64, idle_tokens=TOKENS)
    before = process.memory_info().rss
    for slot in range(64):
        for buffer in buffers(cache):
            buffer[slot] = 1.0
        cache.free(slot, TOKENS)
    grown = process.memory_info().rss - before
    assert grown < 64 * 2**20, "of 256 MiB"
    # The first one is within what may stay idle; others are empty, and can be written to again.
    assert buffers(cache)[0][0].all()
    assert not buffers(cache)[0][5].any()
    buffers(cache)[0][5] = 2.0
    assert buffers(cache)[0][5].all()


def test_neighbours_of_a_slot_that_is_given_back_keep_what_they_have() -> None:
    cache = KvCache(3, 5, blocks=0, idle_tokens=0)  # slots that end within pages
    new = torch.zeros(1, HEADS, DIMENSIONS)
    layer = cache.layer(0, new, new)
    assert layer.keys[0].nbytes % mmap.PAGESIZE
    layer.keys.fill_(1.0)
    cache.free(1, 5)
    assert layer.keys[0].all()
    assert layer.keys[2].all()
