"""What a GPU would be asked, seen on devices that are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loaderd.server.worker import devices
from loaderd.server.worker.engine.batching import choice
from loaderd.server.worker.engine.batching.attention import NAME
from loaderd.server.worker.engine.batching.feed import Feed
from loaderd.server.worker.engine.batching.forward import FlatForward, Forward, ModuleForward
from loaderd.server.worker.engine.batching.history import History
from loaderd.server.worker.engine.batching.kernels import PLAIN
from loaderd.server.worker.engine.batching.kv_cache import BLOCK, KvCache
from loaderd.server.worker.engine.batching.linear import speed_up
from loaderd.server.worker.engine.batching.logits_processors import process
from loaderd.server.worker.engine.batching.runner import Runner
from loaderd.server.worker.engine.batching.suitability import examine
from tests.unit.worker.batching.sampling import asked, random_logits
from tests.unit.worker.batching.test_architectures import ARCHITECTURES
from tests.unit.worker.engine_client import VOCABULARY, build

META = torch.device("meta")
STEP = [
    Feed(0, 40, [5], wants=1),
    Feed(1, 7, [6], wants=1),
    Feed(3, 9, [7], wants=1),
    Feed(4, 0, range(2, 20), wants=0),
    Feed(2, 16, range(2, 9), wants=1),
]
"""Holes, other lengths, a whole prompt and a piece."""


def run_without_numbers(forward: Forward) -> None:
    """On the meta device there are none, so that whatever waits for one fails."""
    cache = KvCache(5, 64, blocks=4)
    logits = Runner(forward, cache, META).run(STEP)
    assert logits.shape == (4, VOCABULARY)
    assert logits.device == META
    with torch.inference_mode():
        cache.keep(0, BLOCK, [2, 1])
        cache.take(3, [2, 1])
        cache.copy(0, 1, 9)
        cache.wipe(0, 9)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_wait_for_no_numbers(architecture: str) -> None:
    model = build(architecture, **ARCHITECTURES[architecture])
    model.set_attn_implementation(NAME)
    # Of two bytes: operators on groups of experts have no other on this device.
    run_without_numbers(ModuleForward(model.to(META, torch.bfloat16)))


def test_steps_of_flat_models_wait_for_no_numbers() -> None:
    model = build("llama").to(META)
    model.set_attn_implementation(NAME)
    speed_up(model, PLAIN, 0)
    run_without_numbers(FlatForward(model, {}))


def test_masks_and_penalties_wait_for_no_numbers() -> None:
    requests = [
        asked(prompt=[3, 4], repetition_penalty=1.5, frequency_penalty=0.5),
        asked(prompt=[5, 6, 5], no_repeat_ngram_size=2, min_new_tokens=3),
        asked(allowed=[7, 8, 9], logit_bias={8: 1.0}),
    ]
    logits = torch.empty(4, 40, device=META)
    process(logits, [(row, History(request)) for row, request in enumerate(requests, 1)])
    assert choice.best(logits).device == META


class _Questions(TorchDispatchMode):  # type: ignore[misc]
    """Counts numbers that are asked for one by one."""

    asked = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.asked += operator is torch.ops.aten._local_scalar_dense.default
        return operator(*args, **kwargs or {})


def test_drawing_asks_for_no_single_numbers() -> None:
    samplings = [
        asked(top_k=3, seed=1).sampling,
        asked(top_p=0.5, seed=2).sampling,
        asked(typical_p=0.5, min_p=0.1, seed=3).sampling,
        asked(seed=4).sampling,
    ]
    with torch.inference_mode(), _Questions() as questions:
        choice.draw(random_logits(1, 4, 1000), samplings, [1, 2, 3, 4])
    assert not questions.asked


def test_a_step_without_logits_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the time that it takes would be measured with the next one."""
    waited: list[torch.device] = []
    monkeypatch.setattr(devices, "wait_for", waited.append)
    model = build("llama")
    model.set_attn_implementation(NAME)
    runner = Runner(ModuleForward(model), KvCache(2, 9, blocks=0), torch.device("cpu"))
    runner.run([Feed(0, 0, [5, 6], wants=1)])
    assert not waited
    runner.run([Feed(1, 0, [5, 6], wants=0)])
    assert waited == [torch.device("cpu")]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_a_model_on_several_devices_gets_places_that_are_on_none(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(architecture, **ARCHITECTURES[architecture])
    examine(model)
    feeds = [Feed(0, 0, [5, 6, 7], wants=1), Feed(1, 0, [9, 8], wants=2)]

    def logits() -> torch.Tensor:
        cache = KvCache(2, 9, blocks=0)
        return Runner(ModuleForward(model), cache, torch.device("cpu")).run(feeds)

    expected = logits()
    model.register_parameter("elsewhere", torch.nn.Parameter(torch.empty(1, device=META)))
    kept: list[Any] = []
    forward = model.forward

    def keeping(*args: Any, logits_to_keep: Any, **kwargs: Any) -> Any:
        kept.append(logits_to_keep)
        return forward(*args, logits_to_keep=logits_to_keep, **kwargs)

    monkeypatch.setattr(model, "forward", keeping)
    assert torch.equal(logits(), expected)
    assert kept == [[2, 3, 4]]


def test_memory_is_that_of_the_devices_of_the_layers() -> None:
    cache = KvCache(2, 9, blocks=0)
    for index, device in enumerate(("cpu", "meta", "meta")):
        new = torch.empty(1, 2, 4, device=device)
        cache.layer(index, new, new)
    assert cache.bytes_per_token == {torch.device("cpu"): 64, META: 128}
