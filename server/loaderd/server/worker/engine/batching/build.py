"""A batching engine around a loaded model."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from transformers import PreTrainedModel

from loaderd.server.box.cpu import CPU
from loaderd.server.worker import devices
from loaderd.server.worker.engine.batching.cuda_graphs import CudaGraphs
from loaderd.server.worker.engine.batching.engine import BatchingEngine
from loaderd.server.worker.engine.batching.feed import Feed
from loaderd.server.worker.engine.batching.kv_cache import BLOCK, KvCache
from loaderd.server.worker.engine.batching.memory import Memory
from loaderd.server.worker.engine.batching.native.kernels import Kernels, kernels_of_this_cpu
from loaderd.server.worker.engine.batching.prefix_cache import PrefixCache
from loaderd.server.worker.engine.batching.preparation import places_of, prepare
from loaderd.server.worker.engine.batching.runner import Runner
from loaderd.server.worker.engine.batching.sampler import BatchSampler
from loaderd.server.worker.engine.batching.scheduler import Capacity
from loaderd.server.worker.engine.batching.static_step import Graphs, StaticSteps
from loaderd.server.worker.engine.batching.suitability import (
    UnsuitableError,
)
from loaderd.server.worker.engine.batching.trials import UNREMEMBERED, Outcome, Trials
from loaderd.server.worker.engine.completion import Tokenizer
from loaderd.server.worker.engine.protocol import Emit
from loaderd.server.worker.layers import input_device, offloaded_bytes

_NO_MEMORY = "too little memory is free for keys and values"


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Bounds of a batching engine.

    Attributes:
        max_slots: Most completions that run at once.
        max_queue: Most requests that wait.
        memory_share: Of the devices' free memory, for keys and values.
        max_memory_bytes: The most of it; more only on accelerators, see `slot_tokens`.
        slot_tokens: What each slot is to hold, or a whole context if that is less.
        prefix_share: Of that, for prompts that have been computed before.
        max_device_bytes: The most that this process may hold of a device, for those with a bound.
        graphs: Whether decode steps may be replayed as CUDA graphs.
    """

    max_slots: int = 64
    max_queue: int = 1024
    memory_share: float = 0.5
    max_memory_bytes: int = 16 * 2**30
    slot_tokens: int = 8192
    prefix_share: float = 0.25
    max_device_bytes: Mapping[str, int] = field(default_factory=dict)
    graphs: bool = True

    def room(self, device: str, promised: int = 0) -> int:
        """Bytes of a device that this process may take yet, at most a share of what is free.

        Args:
            device: The device.
            promised: What will be taken of its bound besides.
        """
        shared = int(devices.free_bytes(device) * self.memory_share)
        most = self.max_device_bytes.get(device)
        if most is None:
            return shared
        return max(min(shared, most - promised - devices.held_bytes().get(device, 0)), 0)


class Built(NamedTuple):
    """An engine that takes requests.

    Attributes:
        engine: It.
        reason: What makes it fit, for operators.
        later_bytes: Memory that it will have taken soon: copies of weights are made beside the
            first requests, which need not wait for them.
    """

    engine: BatchingEngine
    reason: str
    later_bytes: int


def batching_engine(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    model_name: str,
    emit: Emit,
    on_death: Callable[[], None],
    *,
    context_length: int,
    settings: EngineSettings = EngineSettings(),
    trials: Trials = UNREMEMBERED,
    find_kernels: Callable[[], Kernels] = kernels_of_this_cpu,
) -> Built:
    """Makes the engine, if the model computes the same in it.

    Args:
        model: The model; it gets another attention function.
        tokenizer: See `BatchingEngine`, as the following three.
        model_name: For errors.
        emit: Takes outputs.
        on_death: Called at the end of everything.
        context_length: Most tokens of a sequence; 0 for no limit.
        settings: Bounds.
        trials: What was found out before.
        find_kernels: Asked for them if the model is on the CPU.

    Raises:
        UnsuitableError: The model is not for this engine.
    """
    if offloaded_bytes(model):
        raise UnsuitableError("it has offloaded layers, which come to their device for each step")
    own_attention = model.config._attn_implementation
    try:
        prepared = prepare(model, trials, settings.room(CPU), find_kernels)
        linears, forward = prepared.linears, prepared.forward
        no_graphs = prepared.no_graphs if settings.graphs else "switched off"
        graphs, decoding = _graphs(model, no_graphs)
        spare = graphs is not None
        later = linears.missing_bytes
        cache, capacity = _memory(
            prepared.outcome, context_length, settings, spare=spare, later=later
        )
        device = input_device(model)
        static = StaticSteps(forward, cache, device, graphs) if graphs else None
        runner = Runner(forward, cache, device, static, prepared.kernels)
        _fill(runner)
    except UnsuitableError:
        model.set_attn_implementation(own_attention)
        raise
    engine = BatchingEngine(
        runner=runner,
        memory=Memory(cache, PrefixCache(cache.blocks, BLOCK)),
        sampler=BatchSampler(),
        capacity=capacity,
        tokenizer=tokenizer,
        model_name=model_name,
        emit=emit,
        on_death=on_death,
    )
    reasons = [f"it computes the same in batches, {prepared.how}", decoding, str(linears.policy)]
    linears.make_copies_beside()
    return Built(engine, "; ".join(filter(None, reasons)), later)


def _memory(
    outcome: Outcome, context_length: int, settings: EngineSettings, *, spare: bool, later: int = 0
) -> tuple[KvCache, Capacity]:
    devices.release_cached_memory()  # or it would count as taken
    sizes = outcome.bytes_per_token
    rooms = [
        settings.room(device, later if device == CPU else 0) // size
        for device, size in sizes.items()
    ]
    lazy = sizes.keys() == {CPU}
    most = settings.max_memory_bytes // sum(sizes.values())
    if not lazy:
        length = min(context_length or settings.slot_tokens, settings.slot_tokens) + spare
        most = max(most, math.ceil(settings.max_slots * length / (1 - settings.prefix_share)))
    tokens = min(*rooms, most)
    blocks, capacity = _sizes(tokens, context_length, settings, lazy=lazy, spare=spare)
    if capacity.slots < 1 or capacity.slot_tokens < 1:
        raise UnsuitableError(_NO_MEMORY)
    idle = capacity.tokens // 8
    cache = KvCache(capacity.slots, capacity.slot_tokens, blocks, idle_tokens=idle, spare=spare)
    return cache, capacity


def _graphs(model: PreTrainedModel, no_graphs: str | None) -> tuple[Graphs | None, str]:
    """What records decode steps, if anything does, and what to tell of it."""
    places = places_of(model)
    if all(place.type != "cuda" for place in places):
        return None, ""
    if no_graphs is not None:
        return None, f"decode steps not replayed as CUDA graphs: {no_graphs}"
    return CudaGraphs(places.pop()), "decode steps replayed as CUDA graphs"


def _fill(runner: Runner) -> None:
    """Runs one token, so that all memory is there before the first request comes."""
    try:
        runner.run([Feed(slot=0, begin=0, token_ids=[0], wants=1)])
    except Exception as error:
        is_full = isinstance(error, OSError) and error.errno == errno.ENOMEM
        if not (is_full or devices.is_out_of_memory(error)):
            raise
        raise UnsuitableError(_NO_MEMORY) from error


def _sizes(
    tokens: int, context_length: int, settings: EngineSettings, *, lazy: bool, spare: bool
) -> tuple[int, Capacity]:
    """Divides the memory.

    Where the system backs only what is written, every slot may be as long as the context and
    all together are bounded. Elsewhere slots times their length is what there is.
    """
    blocks = int(tokens * settings.prefix_share) // BLOCK
    tokens -= blocks * BLOCK
    if lazy:
        slots, length = settings.max_slots, min(context_length or tokens, tokens)
        return blocks, Capacity(slots, length, tokens, settings.max_queue)
    length = max(tokens // settings.max_slots - spare, settings.slot_tokens)
    length = min(context_length or tokens, length, tokens - spare)
    slots = min(tokens // max(length + spare, 1), settings.max_slots)
    # Where slots of the whole context leave memory, it is not taken for prompts instead.
    share = settings.prefix_share / (1 - settings.prefix_share)
    blocks = min(blocks, math.ceil(slots * length * share / BLOCK))
    return blocks, Capacity(slots, length, slots * length, settings.max_queue)
