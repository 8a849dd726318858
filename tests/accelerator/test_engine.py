"""The engines on a GPU: tokens are those of transformers, however a step is computed."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from loaderd.server.worker import devices
from loaderd.server.worker.engine.batching.build import EngineSettings
from loaderd.server.worker.engine.batching.suitability import UnsuitableError
from loaderd.v1.errors_pb2 import ErrorReason
from loaderd.v1.generation_pb2 import FinishReason
from tests.accelerator.gpu import DEVICE
from tests.unit.worker.batching.test_architectures import ARCHITECTURES, FALLBACKS, PROMPTS
from tests.unit.worker.engine_client import Client, before_each_pass, build, reference

TOKENS = 40
REPLAYED = "decode steps replayed as CUDA graphs"
WAITING = {"gpt_oss", "mixtral", "qwen2_moe"}
"""Mixtures of experts: torch's product of them waits for the device but in bfloat16."""
GREEDY: dict[str, Any] = {"do_sample": False, "ignore_eos": True, "return_token_ids": True}
ALONE: dict[str, Any] = {**GREEDY, "bypass_prefix_cache": True, "max_new_tokens": TOKENS}
SAMPLED: dict[str, Any] = {
    **ALONE,
    "do_sample": True,
    "temperature": 1.5,
    "top_k": 40,
    "top_p": 0.95,
}


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """Float32 means float32: tokens are compared one for one."""
    was = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(was)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def models(architecture: str) -> tuple[Any, Any]:
    """The same model twice: for transformers and for the engine."""
    model = build(architecture, **ARCHITECTURES[architecture]).to(DEVICE)
    return model, copy.deepcopy(model)


@pytest.fixture(scope="module")
def own(models: tuple[Any, Any]) -> list[list[int]]:
    """What transformers makes of each prompt on this device."""
    return [
        reference(models[0], prompt, do_sample=False, max_new_tokens=TOKENS, eos_token_id=None)
        for prompt in PROMPTS
    ]


@pytest.fixture(scope="module")
def client(models: tuple[Any, Any]) -> Iterator[Client]:
    client = Client(models[1], "batching")
    yield client
    client.engine.close()


@pytest.fixture
def llama() -> Iterator[Client]:
    client = Client(build("llama").to(DEVICE), "batching")
    yield client
    client.engine.close()


def test_decode_steps_are_replayed(client: Client, architecture: str) -> None:
    print(architecture, client.reason)
    if architecture in WAITING:
        assert "CUDA graphs" in client.reason
    else:
        assert REPLAYED in client.reason


def test_alone(client: Client, own: list[list[int]]) -> None:
    assert [client.generate(prompt, **ALONE).token_ids for prompt in PROMPTS] == own
    assert len({tuple(one) for one in own}) > 5, "a model that says one thing proves nothing"


def test_together(client: Client, own: list[list[int]]) -> None:
    for _ in range(2):  # replayed from the first step on, the second time
        keys = [client.start(prompt, **ALONE) for prompt in PROMPTS]
        assert [client.wait(key).token_ids for key in keys] == own


def test_with_prefixes_that_are_known(client: Client, own: list[list[int]]) -> None:
    longest = max(PROMPTS, key=len)
    known = {**GREEDY, "max_new_tokens": TOKENS, "cache_salt": "s"}
    first, again = (client.generate(longest, **known) for _ in range(2))
    assert again.finished is not None
    assert again.finished.usage.cached_prompt_tokens == 32
    assert first.token_ids == again.token_ids == own[PROMPTS.index(longest)]


def test_in_small_pieces(
    client: Client, own: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound in ("_LEAST", "_MOST", "_MOST_FREE"):
        monkeypatch.setattr(f"loaderd.server.worker.engine.batching.pace.{bound}", 7)
    keys = [client.start(prompt, **ALONE) for prompt in PROMPTS]
    assert [client.wait(key).token_ids for key in keys] == own


def test_replayed_steps_and_others_give_the_same(models: tuple[Any, Any], client: Client) -> None:
    other = Client(copy.deepcopy(models[0]), "batching", settings=EngineSettings(graphs=False))
    assert "not replayed" in other.reason
    keys = [(client.start(prompt, **ALONE), other.start(prompt, **ALONE)) for prompt in PROMPTS]
    for one, another in keys:
        assert client.wait(one).token_ids == other.wait(another).token_ids
    other.engine.close()


def test_a_seed_gives_the_same_alone_and_beside_fifteen_others(client: Client) -> None:
    alone = [client.generate(prompt, seed=7, **SAMPLED).token_ids for prompt in PROMPTS[:3]]
    keys = [client.start(prompt, seed=7, **SAMPLED) for prompt in PROMPTS[:3]]
    others = [client.start(PROMPTS[i % 8], seed=i, **SAMPLED) for i in range(13)]
    assert [client.wait(key).token_ids for key in keys] == alone
    assert all(client.wait(key).error is None for key in others)
    assert len({tuple(client.wait(key).token_ids) for key in others}) > 8


@pytest.mark.parametrize("name", sorted(WAITING))
def test_mixtures_of_experts_are_replayed_in_bfloat16(name: str) -> None:
    model = build(name, **ARCHITECTURES[name]).to(DEVICE, torch.bfloat16)
    client = Client(model, "batching")
    assert REPLAYED in client.reason
    assert len(client.generate(**ALONE).token_ids) == TOKENS
    client.engine.close()


@pytest.mark.parametrize("name", FALLBACKS)
def test_models_that_take_no_batches_are_served_one_by_one(name: str) -> None:
    model = build(name, **FALLBACKS[name]).to(DEVICE)
    own = [
        reference(model, prompt, do_sample=False, max_new_tokens=12, eos_token_id=None)
        for prompt in PROMPTS
    ]
    with pytest.raises(UnsuitableError):
        Client(model, "batching")
    client = Client(model, "sequential")
    few = ALONE | {"max_new_tokens": 12}
    assert [client.wait(client.start(prompt, **few)).token_ids for prompt in PROMPTS] == own
    client.engine.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    """Of these the first tokens: sums that are rounded in another order part in the end."""
    model = build("llama", num_hidden_layers=4, hidden_size=128).to(DEVICE, dtype)
    own = [reference(model, prompt, do_sample=False, max_new_tokens=1) for prompt in PROMPTS]
    client = Client(model, "batching")
    assert REPLAYED in client.reason
    keys = [client.start(prompt, **ALONE) for prompt in PROMPTS]
    found = [client.wait(key).token_ids for key in keys]
    same = sum(one[:1] == another for one, another in zip(found, own, strict=True))
    assert same >= len(PROMPTS) - 1
    assert all(len(one) == TOKENS for one in found)
    client.engine.close()


def test_cancelled_requests_leave_the_others_as_they_were(llama: Client) -> None:
    expected = [llama.generate(prompt, **ALONE).token_ids for prompt in PROMPTS]
    kept = [llama.start(prompt, **ALONE) for prompt in PROMPTS[::2]]
    gone = [llama.start(prompt, **ALONE | {"max_new_tokens": 200}) for prompt in PROMPTS[1::2]]
    kept += [llama.start(prompt, **ALONE) for prompt in PROMPTS[1::2]]
    for key in gone:
        llama.engine.cancel(key)
    assert [llama.wait(key).token_ids for key in kept] == expected[::2] + expected[1::2]
    for key in gone:
        assert llama.wait(key).finish.reason == FinishReason.FINISH_REASON_CANCELLED
    assert [llama.generate(prompt, **ALONE).token_ids for prompt in PROMPTS] == expected


def test_requests_of_all_lengths_come_and_go(llama: Client) -> None:
    """Rows and lengths of steps change all the time, and slots change hands."""
    draw = random.Random(3)
    asked = [
        (draw.choices(range(2, 90), k=draw.randrange(1, 120)), draw.randrange(1, 100))
        for _ in range(60)
    ]
    alone = [
        llama.generate(prompt, **ALONE | {"max_new_tokens": count}).token_ids
        for prompt, count in asked
    ]
    keys = [llama.start(prompt, **ALONE | {"max_new_tokens": count}) for prompt, count in asked]
    assert [llama.wait(key).token_ids for key in keys] == alone


def test_a_request_that_the_device_has_no_memory_for_fails_alone(
    llama: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = llama.generate(PROMPTS[3], **ALONE).token_ids
    hogs: list[torch.Tensor] = []

    def hog(positions: torch.Tensor) -> None:
        if len(positions.flatten()) > 100:
            hogs.append(torch.empty(1 << 50, dtype=torch.uint8, device=DEVICE))

    before_each_pass(llama.model, monkeypatch, hog)
    other = llama.start(PROMPTS[3], **ALONE)
    failed = llama.generate(list(range(2, 90)) * 2, **ALONE)
    assert failed.error is not None
    assert failed.error.reason == ErrorReason.ERROR_REASON_DEVICE_MEMORY
    assert llama.wait(other).token_ids == expected
    assert llama.generate(PROMPTS[3], **ALONE).token_ids == expected
    assert not llama.died.is_set()


def test_an_engine_that_is_gone_leaves_no_memory() -> None:
    gc.collect()
    devices.release_cached_memory()
    before = devices.allocated_bytes()
    client = Client(build("llama").to(DEVICE), "batching")
    for key in [client.start(prompt, **ALONE) for prompt in PROMPTS]:
        client.wait(key)
    assert devices.allocated_bytes() > before
    client.engine.close()
    del client
    gc.collect()
    devices.release_cached_memory()
    assert devices.allocated_bytes() <= before + (256 << 20)  # what libraries keep
