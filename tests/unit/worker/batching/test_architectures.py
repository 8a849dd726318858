"""Greedy tokens are those of transformers, alone and among others, for every kind of attention."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest

from loaderd.server.worker.engine.batching.build import EngineSettings
from loaderd.server.worker.engine.batching.native.kernels import Kernels, kernels_of_this_cpu
from loaderd.server.worker.engine.batching.suitability import UnsuitableError, examine
from tests.unit.worker.engine_client import VOCABULARY, Client, build, no_kernels, reference

WINDOW = 8
_GLU = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
_WINDOWED = {**_GLU, "sliding_window": WINDOW}
_MIXED = {
    **_WINDOWED,
    "head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
_EXPERTS = {**_GLU, "num_experts_per_tok": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _GLU,
    "qwen2": _GLU,
    "qwen3": {**_GLU, "head_dim": 8},
    "mistral": _WINDOWED,
    "gemma2": _MIXED,
    "gemma3_text": _MIXED,
    "phi3": {**_GLU, "pad_token_id": 0},
    "gpt2": {"n_head": 4, "n_inner": 64},
    "gpt_neox": {"intermediate_size": 64, "num_attention_heads": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "num_attention_heads": 4},
    "gpt_oss": {**_MIXED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {**_EXPERTS, "num_local_experts": 4, "sliding_window": WINDOW},
    "qwen2_moe": {
        **_EXPERTS,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 4,
    },
    "olmo2": _GLU,
    "cohere2": _WINDOWED,
}
FALLBACKS: dict[str, dict[str, Any]] = {
    "falcon": {"num_attention_heads": 4},
    "gpt_neo": {"num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "bloom": {"n_head": 4},
    "mamba": {},
}
PROMPTS = [
    random.Random(length).choices(range(2, VOCABULARY), k=length)
    for length in (1, 5, 12, 40, 23, 3, 33, 17)
]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def models(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The same model twice: for transformers and for the engine."""
    model = build(request.param, **ARCHITECTURES[request.param])
    return model, copy.deepcopy(model)


@pytest.fixture(scope="module")
def own(models: tuple[Any, Any]) -> list[list[int]]:
    """What transformers makes of each prompt."""
    return [
        reference(models[0], prompt, do_sample=False, max_new_tokens=12, eos_token_id=None)
        for prompt in PROMPTS
    ]


@pytest.fixture(scope="module", params=[kernels_of_this_cpu, no_kernels])
def client(
    models: tuple[Any, Any], request: pytest.FixtureRequest, kernels: Kernels
) -> Iterator[Client]:
    """With kernels compiled for this CPU, and with torch's alone."""
    client = Client(copy.deepcopy(models[1]), "batching", find_kernels=request.param)
    assert ("no kernels" in client.reason) == (request.param is no_kernels)
    yield client
    client.engine.close()


def options() -> dict[str, Any]:
    return {"do_sample": False, "max_new_tokens": 12, "ignore_eos": True, "return_token_ids": True}


def test_alone(client: Client, own: list[list[int]]) -> None:
    tokens = [
        client.generate(prompt, bypass_prefix_cache=True, **options()).token_ids
        for prompt in PROMPTS
    ]
    assert tokens == own
    assert len({tuple(one) for one in own}) > 5, "a model that says one thing proves nothing"


def test_together(client: Client, own: list[list[int]]) -> None:
    keys = [client.start(prompt, bypass_prefix_cache=True, **options()) for prompt in PROMPTS]
    assert [client.wait(key).token_ids for key in keys] == own


def test_together_with_rows_of_other_lengths_apart(
    client: Client, own: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loaderd.server.worker.engine.batching.attention._WASTE", 10)
    keys = [client.start(prompt, bypass_prefix_cache=True, **options()) for prompt in PROMPTS]
    assert [client.wait(key).token_ids for key in keys] == own


def test_with_prefixes_that_are_known(client: Client, own: list[list[int]]) -> None:
    longest = max(PROMPTS, key=len)
    first = client.generate(longest, cache_salt="s", **options())
    again = client.generate(longest, cache_salt="s", **options())
    assert first.finished is not None
    assert again.finished is not None
    assert first.finished.usage.cached_prompt_tokens == 0
    assert again.finished.usage.cached_prompt_tokens == 32
    assert first.token_ids == again.token_ids == own[PROMPTS.index(longest)]


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_in_small_pieces(
    client: Client, own: list[list[int]], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loaderd.server.worker.engine.batching.pace._MOST", chunk)
    monkeypatch.setattr("loaderd.server.worker.engine.batching.pace._MOST_FREE", chunk)
    monkeypatch.setattr("loaderd.server.worker.engine.batching.pace._LEAST", chunk)
    keys = [client.start(prompt, bypass_prefix_cache=True, **options()) for prompt in PROMPTS]
    assert [client.wait(key).token_ids for key in keys] == own


@pytest.mark.parametrize("architecture", FALLBACKS)
def test_others_are_left_as_they_are(architecture: str) -> None:
    model = build(architecture, **FALLBACKS[architecture])
    expected = reference(model, do_sample=False, max_new_tokens=5)
    with pytest.raises(UnsuitableError, match="its attention cannot be replaced"):
        examine(model)
    assert reference(model, do_sample=False, max_new_tokens=5) == expected


def test_a_model_without_memory_for_batches_is_left_as_it_was() -> None:
    model = build("llama")
    expected = reference(model, do_sample=False, max_new_tokens=5)
    with pytest.raises(UnsuitableError, match="too little memory"):
        Client(model, "batching", settings=EngineSettings(max_memory_bytes=100))
    assert reference(model, do_sample=False, max_new_tokens=5) == expected
