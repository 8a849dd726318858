"""A batching engine around a loaded model."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from loaderd.server.worker import devices
from loaderd.server.worker.engine.batching.attention import NAME
from loaderd.server.worker.engine.batching.engine import BatchingEngine
from loaderd.server.worker.engine.batching.forward import (
    FlatForward,
    Forward,
    ModuleForward,
    can_flatten,
)
from loaderd.server.worker.engine.batching.kernels import LinearPolicy
from loaderd.server.worker.engine.batching.kv_cache import BLOCK, KvCache
from loaderd.server.worker.engine.batching.linear import speed_up
from loaderd.server.worker.engine.batching.memory import Memory
from loaderd.server.worker.engine.batching.prefix_cache import PrefixCache
from loaderd.server.worker.engine.batching.runner import Feed, Runner
from loaderd.server.worker.engine.batching.sampler import BatchSampler
from loaderd.server.worker.engine.batching.scheduler import Capacity
from loaderd.server.worker.engine.batching.suitability import (
    UnsuitableError,
    examine,
    input_device,
)
from loaderd.server.worker.engine.batching.trials import UNREMEMBERED, Outcome, Trials, identity_of
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
    device_map: str = devices.AUTO,
    settings: EngineSettings = EngineSettings(),
    trials: Trials = UNREMEMBERED,
) -> tuple[BatchingEngine, str]:
    """Makes the engine, if the model computes the same in it.

    Args:
        model: The model; it gets another attention function.
        tokenizer: See `BatchingEngine`, as the following three.
        model_name: For errors.
        emit: Takes outputs.
        on_death: Called at the end of everything.
        context_length: Most tokens of a sequence; 0 for no limit.
        device_map: Where the model is, as it was asked for.
        settings: Bounds.
        trials: What was found out before.

    Returns:
        The engine, and what makes it fit, for operators.

    Raises:
        UnsuitableError: The model is not for this engine.
    """
    own_attention = model.config._attn_implementation
    spare = int(devices.free_bytes(device_map) * settings.memory_share)
    try:
        outcome, linears = _prepare(model, trials, spare)
        forward, how = _forward(model, outcome)
        cache, capacity = _memory(model, outcome, context_length, device_map, settings)
        runner = Runner(forward, cache, input_device(model), linears)
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
    reasons = [f"it computes the same in batches, {how}", str(linears)]
    return engine, "; ".join(filter(None, reasons))


def _memory(
    model: PreTrainedModel,
    outcome: Outcome,
    context_length: int,
    device_map: str,
    settings: EngineSettings,
) -> tuple[KvCache, Capacity]:
    free = int(devices.free_bytes(device_map) * settings.memory_share)
    tokens = min(free, settings.max_memory_bytes) // outcome.bytes_per_token
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    blocks, capacity = _sizes(tokens, context_length, settings, lazy=on_cpu)
    if capacity.slots < 1 or capacity.slot_tokens < 1:
        raise UnsuitableError(_NO_MEMORY)
    idle = capacity.tokens // 8
    return KvCache(capacity.slots, capacity.slot_tokens, blocks, idle_tokens=idle), capacity


def _prepare(
    model: PreTrainedModel, trials: Trials, spare_bytes: int
) -> tuple[Outcome, LinearPolicy]:
    """Gives the model our attention and our linear layers, and tries it if that was never done."""
    identity = identity_of(model)
    known = trials.find(identity)
    if known is not None:
        model.set_attn_implementation(NAME)
        return known, speed_up(model, spare_bytes)
    findings = examine(model)
    linears = speed_up(model, spare_bytes)
    is_flat = can_flatten(model) and findings.agree(model, FlatForward(model, findings.windows))
    outcome = Outcome(findings.bytes_per_token, findings.windows, is_flat)
    trials.keep(identity, outcome)
    return outcome, linears


def _forward(model: PreTrainedModel, outcome: Outcome) -> tuple[Forward, str]:
    if outcome.is_flat and can_flatten(model):
        return FlatForward(model, outcome.windows), "as one sequence of operators"
    return ModuleForward(model), "module by module"


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
    tokens: int, context_length: int, settings: EngineSettings, *, lazy: bool
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
    length = min(context_length or tokens, max(tokens // 32, 8192), tokens)
    slots = min(tokens // max(length, 1), settings.max_slots)
    return blocks, Capacity(slots, length, slots * length, settings.max_queue)
