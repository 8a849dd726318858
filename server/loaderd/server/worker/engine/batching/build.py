"""A batching engine around a loaded model."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from loaderd.server.worker import devices
from loaderd.server.worker.engine.batching.cuda_graphs import CudaGraphs
from loaderd.server.worker.engine.batching.engine import BatchingEngine
from loaderd.server.worker.engine.batching.feed import Feed
from loaderd.server.worker.engine.batching.forward import (
    FlatForward,
    Forward,
    ModuleForward,
    can_flatten,
)
from loaderd.server.worker.engine.batching.kv_cache import BLOCK, KvCache
from loaderd.server.worker.engine.batching.linear import speed_up
from loaderd.server.worker.engine.batching.memory import Memory
from loaderd.server.worker.engine.batching.prefix_cache import PrefixCache
from loaderd.server.worker.engine.batching.runner import Runner
from loaderd.server.worker.engine.batching.sampler import BatchSampler
from loaderd.server.worker.engine.batching.scheduler import Capacity
from loaderd.server.worker.engine.batching.static_step import Graphs, StaticSteps
from loaderd.server.worker.engine.batching.suitability import (
    Findings,
    UnsuitableError,
    examine,
    input_device,
)
from loaderd.server.worker.engine.completion import Tokenizer
from loaderd.server.worker.engine.protocol import Emit

_NO_MEMORY = "too little memory is free for keys and values"


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Bounds of a batching engine.

    Attributes:
        max_slots: Most completions that run at once.
        max_queue: Most requests that wait.
        memory_share: Of the devices' free memory, for keys and values.
        max_memory_bytes: The most of it.
        prefix_share: Of that, for prompts that have been computed before.
    """

    max_slots: int = 64
    max_queue: int = 1024
    memory_share: float = 0.5
    max_memory_bytes: int = 16 * 2**30
    prefix_share: float = 0.25


def batching_engine(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    model_name: str,
    emit: Emit,
    on_death: Callable[[], None],
    *,
    context_length: int,
    settings: EngineSettings = EngineSettings(),
) -> tuple[BatchingEngine, str]:
    """Makes the engine, if the model computes the same in it.

    Args:
        model: The model; it gets another attention function.
        tokenizer: See `BatchingEngine`, as the following three.
        model_name: For errors.
        emit: Takes outputs.
        on_death: Called at the end of everything.
        context_length: Most tokens of a sequence; 0 for no limit.
        settings: Bounds.

    Returns:
        The engine, and what makes it fit, for operators.

    Raises:
        UnsuitableError: The model is not for this engine.
    """
    findings = examine(model)
    try:
        linears = speed_up(model, int(devices.free_bytes(devices.CPU) * settings.memory_share))
        forward, how = _forward(model, findings)
        graphs, decoding = _graphs(model, findings, forward)
        spare = graphs is not None
        cache, capacity = _memory(findings, context_length, settings, spare=spare)
        device = input_device(model)
        static = StaticSteps(forward, cache, device, graphs) if graphs else None
        runner = Runner(forward, cache, device, linears, static)
        _fill(runner)
    except UnsuitableError:
        model.set_attn_implementation(findings.own_attention)
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
    reasons = [f"it computes the same in batches, {how}", decoding, str(linears)]
    return engine, "; ".join(filter(None, reasons))


def _memory(
    findings: Findings, context_length: int, settings: EngineSettings, *, spare: bool
) -> tuple[KvCache, Capacity]:
    devices.release_cached_memory()  # or it would count as taken
    sizes = findings.bytes_per_token
    rooms = [
        int(devices.free_bytes(str(device)) * settings.memory_share) // size
        for device, size in sizes.items()
    ]
    tokens = min(*rooms, settings.max_memory_bytes // sum(sizes.values()))
    on_cpu = all(device.type == "cpu" for device in sizes)
    blocks, capacity = _sizes(tokens, context_length, settings, lazy=on_cpu, spare=spare)
    if capacity.slots < 1 or capacity.slot_tokens < 1:
        raise UnsuitableError(_NO_MEMORY)
    idle = capacity.tokens // 8
    cache = KvCache(capacity.slots, capacity.slot_tokens, blocks, idle_tokens=idle, spare=spare)
    return cache, capacity


def _forward(model: PreTrainedModel, findings: Findings) -> tuple[Forward, str]:
    if can_flatten(model):
        flat = FlatForward(model, findings.windows)
        if findings.agree(model, flat):
            return flat, "as one sequence of operators"
    return ModuleForward(model), "module by module"


def _graphs(
    model: PreTrainedModel, findings: Findings, forward: Forward
) -> tuple[Graphs | None, str]:
    """What records decode steps, if anything does, and what to tell of it."""
    places = _devices(model)
    if all(place.type != "cuda" for place in places):
        return None, ""
    try:
        if len(places) > 1:
            raise UnsuitableError("its layers are on several devices")
        device = places.pop()
        findings.check_static(model, forward, CudaGraphs(device))
    except UnsuitableError as error:
        return None, f"decode steps not replayed as CUDA graphs: {error}"
    # Not those of the trial: their memory goes with them.
    return CudaGraphs(device), "decode steps replayed as CUDA graphs"


def _devices(model: PreTrainedModel) -> set[torch.device]:
    return {parameter.device for parameter in model.parameters()}


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
    length = min(context_length or tokens, max(tokens // 32, 8192), tokens - spare)
    slots = min(tokens // max(length + spare, 1), settings.max_slots)
    return blocks, Capacity(slots, length, slots * length, settings.max_queue)
