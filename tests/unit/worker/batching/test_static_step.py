from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loaderd.server.worker.engine.batching import build as building
from loaderd.server.worker.engine.batching import preparation, static_step
from loaderd.server.worker.engine.batching.attention_kernels import seen_mask
from loaderd.server.worker.engine.batching.build import EngineSettings
from loaderd.server.worker.engine.batching.feed import Feed
from loaderd.server.worker.engine.batching.forward import FlatForward, Forward, ModuleForward
from loaderd.server.worker.engine.batching.kernels import PLAIN
from loaderd.server.worker.engine.batching.kv_cache import KvCache
from loaderd.server.worker.engine.batching.linear import speed_up
from loaderd.server.worker.engine.batching.runner import Runner
from loaderd.server.worker.engine.batching.static_step import StaticSteps
from loaderd.server.worker.engine.batching.suitability import examine
from loaderd.v1.errors_pb2 import ErrorReason
from tests.unit.worker.batching.recording import Failing, Recording, Repeating
from tests.unit.worker.batching.test_architectures import ARCHITECTURES, PROMPTS
from tests.unit.worker.engine_client import (
    PROMPT,
    VOCABULARY,
    Client,
    before_each_pass,
    build,
    reference,
)

CPU = torch.device("cpu")
SLOTS, TOKENS = 11, 60
LONG = random.Random(3).choices(range(2, VOCABULARY), k=40)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that texts of few tokens have lengths of several sizes."""
    monkeypatch.setattr(static_step, "_LEAST_LENGTH", 8)


class Texts:
    """Some prompts and what the model goes on with, each in a slot."""

    def __init__(self, forward: Forward, graphs: Repeating | None = None, **options: Any) -> None:
        self.cache = KvCache(SLOTS, TOKENS, blocks=0, spare=graphs is not None)
        self.static = None
        if graphs is not None:
            options = {"patience": 0} | options
            self.static = StaticSteps(forward, self.cache, CPU, graphs, **options)
        self.runner = Runner(forward, self.cache, CPU, static=self.static)
        self.token_ids: dict[int, list[int]] = {}
        self.positions: dict[int, int] = {}
        self.logits: list[torch.Tensor] = []

    def piece(self, slot: int, begin: int, prompt: Sequence[int], *, is_last: bool) -> None:
        """Computes a part of a prompt, and the next token with the last one."""
        logits = self.runner.run([Feed(slot, begin, prompt, wants=int(is_last))])
        if is_last:
            self.token_ids[slot] = [int(logits.argmax())]
            self.positions[slot] = begin + len(prompt)

    def decode(self, slots: Sequence[int], steps: int = 1) -> None:
        for _ in range(steps):
            feeds = [Feed(n, self.positions[n], self.token_ids[n][-1:], wants=1) for n in slots]
            logits = self.runner.run(feeds)
            self.logits.append(logits)
            for slot, token_id in zip(slots, logits.argmax(-1).tolist(), strict=True):
                self.token_ids[slot].append(token_id)
                self.positions[slot] += 1


def some_texts(texts: Texts) -> Texts:
    """Holes between slots, one that fills with a prompt meanwhile, lengths that cross sizes."""
    for slot, prompt in ((3, LONG[:12]), (0, LONG[:1]), (1, LONG[5:10]), (6, LONG[:29])):
        texts.piece(slot, 0, prompt, is_last=True)
    texts.piece(4, 0, LONG[:9], is_last=False)
    texts.decode([3, 0, 6, 1], 2)
    texts.piece(4, 9, LONG[9:16], is_last=False)
    texts.decode([1, 3, 0], 3)
    texts.piece(4, 16, LONG[16:19], is_last=True)
    texts.decode([0, 1, 3, 4, 6], 5)
    texts.piece(9, 0, LONG[7:10], is_last=True)
    texts.decode([9, 4, 1], 2)
    texts.decode([0])
    return texts


def agree(found: Texts, expected: Texts) -> None:
    assert found.token_ids == expected.token_ids
    for one, other in zip(found.logits, expected.logits, strict=True):
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-4)
    assert len({tuple(one) for one in expected.token_ids.values()}) > 3, "proves nothing"


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Any:
    model = build(request.param, **ARCHITECTURES[request.param])
    examine(model)
    return model


@pytest.fixture(scope="module")
def llama() -> ModuleForward:
    model = build("llama")
    examine(model)
    return ModuleForward(model)


@pytest.mark.parametrize("graphs", [Repeating, Recording])
def test_tokens_are_those_of_other_steps(model: Any, graphs: Callable[[], Repeating]) -> None:
    kind = graphs()
    found = some_texts(Texts(ModuleForward(model), kind))
    agree(found, some_texts(Texts(ModuleForward(model))))
    assert found.static is not None
    assert found.static.failure is None
    assert kind.replayed == len(found.logits) + 1  # and the prompt of one token
    assert 3 < kind.captured < kind.replayed


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_flat_models_have_them_too(architecture: str) -> None:
    model = build(architecture, **ARCHITECTURES[architecture])
    findings = examine(model)
    speed_up(model, PLAIN, 0)
    flat = FlatForward(model, findings.windows)
    agree(some_texts(Texts(flat, Recording())), some_texts(Texts(ModuleForward(model))))
    findings.check_static(model, flat, Recording())


@settings(max_examples=15)
@given(
    st.dictionaries(st.integers(0, SLOTS - 1), st.integers(1, TOKENS - 8), min_size=1), st.data()
)
def test_any_slots_of_any_lengths(
    llama: ModuleForward, lengths: dict[int, int], data: st.DataObject
) -> None:
    numbers = random.Random(len(lengths))
    found, expected = Texts(llama, Repeating()), Texts(llama)
    for slot, length in lengths.items():
        prompt = numbers.choices(range(VOCABULARY), k=length)
        for texts in (found, expected):
            texts.piece(slot, 0, prompt, is_last=True)
    for _ in range(4):
        slots = data.draw(st.lists(st.sampled_from(sorted(lengths)), unique=True, min_size=1))
        found.decode(slots)
        expected.decode(slots)
    assert found.token_ids == expected.token_ids
    for slot, length in found.positions.items():
        for texts in (found, expected):
            layer = texts.cache.layer(1, torch.empty(0), torch.empty(0))
            texts.logits.append(layer.keys[slot, :, :length])
        assert torch.allclose(found.logits[-1], expected.logits[-1], atol=1e-5)


def test_a_token_that_wants_no_logits_gets_none(llama: ModuleForward) -> None:
    texts = Texts(llama, Recording())
    texts.piece(0, 0, LONG[:4], is_last=True)
    logits = texts.runner.run([Feed(1, 0, [5], wants=0), Feed(0, 4, [6], wants=1)])
    expected = Texts(llama)
    expected.piece(0, 0, LONG[:4], is_last=True)
    assert torch.allclose(logits, expected.runner.run([Feed(0, 4, [6], wants=1)]), atol=1e-5)
    assert texts.runner.run([Feed(1, 1, [5], wants=0)]).shape == (0, VOCABULARY)


def test_logits_belong_to_the_caller(llama: ModuleForward) -> None:
    texts = Texts(llama, Recording())
    texts.piece(0, 0, LONG[:4], is_last=True)
    texts.decode([0])
    kept = texts.logits[0].clone()
    texts.decode([0], 2)
    assert torch.equal(texts.logits[0], kept)
    with torch.inference_mode():
        texts.logits[0].fill_(0.0)
    assert texts.runner.run([Feed(0, 7, [6], wants=1)]).any()


def test_a_shape_is_recorded_when_it_comes_again_and_again(llama: ModuleForward) -> None:
    graphs = Repeating()
    texts = Texts(llama, graphs, patience=3)
    texts.piece(0, 0, LONG[:17], is_last=True)  # up to 32
    texts.piece(1, 0, LONG[:2], is_last=True)
    for done in range(1, 8):
        texts.decode([0, 1])
        assert graphs.captured == (done > 3)
        assert graphs.replayed == max(done - 3, 0)
    texts.decode([0])
    assert graphs.captured == 1


def test_what_was_not_used_for_longest_is_recorded_anew(llama: ModuleForward) -> None:
    graphs = Repeating()
    texts = Texts(llama, graphs, most_graphs=2)
    for slot in range(4):
        texts.piece(slot, 0, LONG[:17], is_last=True)
    for highest, captured in ((1, 1), (2, 2), (1, 2), (4, 3), (1, 3), (4, 3), (2, 4), (1, 5)):
        texts.decode(range(highest))
        assert graphs.captured == captured


@pytest.mark.parametrize("successes", [0, 1])
def test_after_a_failure_steps_go_the_other_way_for_good(
    llama: ModuleForward, successes: int, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = Failing(successes)
    with caplog.at_level(logging.WARNING):
        found = some_texts(Texts(llama, graphs))
    agree(found, some_texts(Texts(llama)))
    assert graphs.tried == successes + 1
    assert found.static is not None
    assert found.static.failure == "out of memory"
    assert len(caplog.records) == 1
    assert "out of memory" in caplog.text


def test_a_cache_without_spare_places_is_refused(llama: ModuleForward) -> None:
    with pytest.raises(ValueError, match="spare"):
        StaticSteps(llama, KvCache(2, 8, blocks=0), CPU, Repeating())


def take_for_places(monkeypatch: pytest.MonkeyPatch, places: set[torch.device]) -> None:
    for module in (building, preparation):
        monkeypatch.setattr(module, "places_of", lambda _model: set(places))


class OnCuda:
    """An engine that takes the CPU for a CUDA device."""

    def __init__(self, graphs: Callable[..., Repeating], monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Repeating] = []

        def make(device: torch.device) -> Repeating:
            assert device.type == "cuda"
            self.made.append(graphs())
            return self.made[-1]

        take_for_places(monkeypatch, {torch.device("cuda", 0)})
        for module in (building, preparation):
            monkeypatch.setattr(module, "CudaGraphs", make)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss", "gpt2", "mixtral"])
def test_an_engine_replays_its_steps(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = OnCuda(Recording, monkeypatch)
    model = build(architecture, **ARCHITECTURES[architecture])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
    own = [
        reference(copy.deepcopy(model), prompt, eos_token_id=None, **options) for prompt in PROMPTS
    ]
    client = Client(model, "batching", settings=EngineSettings(max_slots=5))
    assert "decode steps replayed as CUDA graphs" in client.reason
    options |= {"ignore_eos": True, "return_token_ids": True}
    keys = [client.start(prompt, **options) for prompt in PROMPTS]
    assert [client.wait(key).token_ids for key in keys] == own
    client.engine.close()
    _trial, graphs = cuda.made
    assert graphs.replayed, "steps in which all decode are replayed"


def test_an_engine_goes_on_when_it_cannot_record(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = OnCuda(Failing, monkeypatch)
    client = Client(build("llama"), "batching")
    assert "decode steps not replayed as CUDA graphs: out of memory" in client.reason
    assert len(cuda.made) == 1, "only the trial's"
    assert len(client.token_ids(max_new_tokens=9, ignore_eos=True)) == 9
    client.engine.close()


def test_an_engine_does_not_replay_what_computes_something_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    OnCuda(Recording, monkeypatch)
    monkeypatch.setattr(
        static_step, "seen_mask", lambda positions, *rest: seen_mask(positions - 2, *rest)
    )
    client = Client(build("llama"), "batching")
    assert "not replayed as CUDA graphs: its logits differ" in client.reason
    client.engine.close()


def test_a_model_on_several_devices_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    take_for_places(monkeypatch, {torch.device("cuda", 0), torch.device("cuda", 1)})
    client = Client(build("llama"), "batching")
    assert "its layers are on several devices" in client.reason
    client.engine.close()


def test_nothing_is_said_of_graphs_on_a_cpu() -> None:
    client = Client(build("llama"), "batching")
    assert "CUDA" not in client.reason
    client.engine.close()


def test_a_replay_that_fails_fails_like_any_step(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = OnCuda(Repeating, monkeypatch)
    model = build("llama")
    expected = reference(copy.deepcopy(model), do_sample=False, max_new_tokens=9, eos_token_id=None)
    client = Client(model, "batching")
    options: dict[str, Any] = {"do_sample": False, "ignore_eos": True, "max_new_tokens": 9}
    assert client.token_ids(**options) == expected
    graphs = cuda.made[-1]
    replayed: list[int] = []

    def fail(positions: torch.Tensor) -> None:
        if positions.max() == len(PROMPT) + 5 and not replayed:
            replayed.append(graphs.replayed)
            raise MemoryError

    before = graphs.replayed
    before_each_pass(model, monkeypatch, fail)
    outputs = client.generate(**options)
    assert outputs.error is not None
    assert outputs.error.reason == ErrorReason.ERROR_REASON_DEVICE_MEMORY
    (in_vain,) = replayed
    assert in_vain > before
    assert client.token_ids(**options) == expected
    assert graphs.replayed > in_vain
    assert graphs.captured == 2
    client.engine.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cuda_replays_the_same_tokens(architecture: str) -> None:
    model = build(architecture, **ARCHITECTURES[architecture])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
    own = [
        reference(copy.deepcopy(model), prompt, eos_token_id=None, **options) for prompt in PROMPTS
    ]
    client = Client(model.to("cuda:0"), "batching")
    assert "CUDA graphs" in client.reason
    options |= {"ignore_eos": True, "return_token_ids": True}
    keys = [client.start(prompt, **options) for prompt in PROMPTS]
    assert [client.wait(key).token_ids for key in keys] == own
    client.engine.close()
