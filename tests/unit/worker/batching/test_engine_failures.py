"""What goes wrong with one request harms no other, neither beside it nor after it."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch

from loaderd.server.worker.engine.batching import engine as engines
from loaderd.server.worker.engine.batching.build import EngineSettings
from loaderd.server.worker.engine.batching.kv_cache import KvCache
from loaderd.server.worker.engine.completion import Tokenizer
from loaderd.v1.errors_pb2 import ErrorReason
from loaderd.v1.generation_pb2 import FinishReason
from tests.unit.worker.engine_client import (
    PROMPT,
    TIMEOUT,
    TOKENIZER_SPECIAL_IDS,
    VOCABULARY,
    Client,
    Gate,
    Numbers,
    before_each_pass,
    build,
)

GREEDY: dict[str, Any] = {"do_sample": False, "ignore_eos": True, "return_token_ids": True}
ALONE: dict[str, Any] = {**GREEDY, "bypass_prefix_cache": True}
LONG = random.Random(4).choices(range(2, VOCABULARY - 1), k=200)


@pytest.fixture
def client() -> Iterator[Client]:
    client = Client(build("llama"), "batching", settings=EngineSettings(max_slots=2))
    yield client
    client.engine.close()


@pytest.mark.parametrize("beyond", [[VOCABULARY], [3, VOCABULARY + 5]])
def test_bad_words_that_the_model_has_no_tokens_for_cannot_come(
    client: Client, beyond: list[int]
) -> None:
    expected = client.generate(max_new_tokens=30, **ALONE).token_ids
    key = client.start(max_new_tokens=30, bad_words=["x"], bad_word_ids=[beyond, [5]], **ALONE)
    beside = client.start(max_new_tokens=30, **ALONE)
    assert client.wait(key).error is None
    assert 5 not in client.wait(key).token_ids
    assert client.wait(beside).token_ids == expected


def test_ends_of_sequence_that_the_model_has_no_tokens_for_cannot_come() -> None:
    model = build("llama")
    model.generation_config.eos_token_id = [1, VOCABULARY + 3]
    client = Client(model, "batching")
    outputs = client.generate(max_new_tokens=5, min_new_tokens=2)
    assert outputs.error is None
    client.engine.close()


def test_memory_that_lacks_for_a_prompts_log_probabilities_ends_that_request_alone(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(engines, "prompt_logprobs", full)
    other = client.start(max_new_tokens=30, **ALONE)
    outputs = client.generate(prompt_logprobs=0, max_new_tokens=5)
    assert outputs.error is not None
    assert outputs.error.reason == ErrorReason.ERROR_REASON_DEVICE_MEMORY
    assert len(client.wait(other).token_ids) == 30


def test_a_text_that_cannot_be_decoded_ends_its_request_alone(client: Client) -> None:
    class Broken(Numbers):
        def decode(self, token_ids: list[int], **options: Any) -> str:
            if 50 in token_ids:
                raise TypeError
            return super().decode(token_ids, **options)

    client.engine._tokenizer = Tokenizer(Broken(), TOKENIZER_SPECIAL_IDS)  # type: ignore[attr-defined]
    other = client.start([7, 8], max_new_tokens=3, allowed_token_ids={"ids": [9]}, **ALONE)
    outputs = client.generate([50, *[7] * 40], echo=True, max_new_tokens=5)
    assert outputs.error is not None
    assert outputs.error.reason == ErrorReason.ERROR_REASON_INTERNAL
    assert len(client.wait(other).token_ids) == 3
    assert not client.died.is_set()


@pytest.mark.parametrize("broken", ["take", "keep"])
def test_a_prefix_that_cannot_be_copied_is_not_known_afterwards(
    client: Client,
    broken: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    expected = client.generate(LONG[:100], max_new_tokens=5, **ALONE).token_ids
    if broken == "take":
        client.generate(LONG[:100], max_new_tokens=1, **GREEDY)
    with monkeypatch.context() as patched:
        patched.setattr(KvCache, broken, full)
        outputs = client.generate(LONG[:100], max_new_tokens=5, **GREEDY)
    assert outputs.error is not None
    assert outputs.error.reason == ErrorReason.ERROR_REASON_DEVICE_MEMORY
    assert client.generate(LONG[:100], max_new_tokens=5, **GREEDY).token_ids == expected
    assert "trying each alone" not in caplog.text


def spoil(client: Client, token_id: int) -> None:
    """Makes the model give no numbers after a token, as overflows in float16 do."""
    with torch.no_grad():
        client.model.model.embed_tokens.weight[token_id] = float("nan")


def test_what_is_no_number_is_not_kept_for_prompts_that_begin_alike(client: Client) -> None:
    weights = client.model.model.embed_tokens.weight
    good = weights.detach().clone()
    spoil(client, LONG[20])
    assert client.generate(LONG[:100], max_new_tokens=3).error is not None
    with torch.no_grad():
        weights.copy_(good)
    assert client.generate(LONG[:100], max_new_tokens=3).error is None


def test_a_cancelled_prompt_leaves_nothing_in_its_slot(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    unspoiled: dict[str, Any] = {"allowed_token_ids": {"ids": range(2, VOCABULARY - 1)}}
    expected = client.generate(max_new_tokens=40, **unspoiled, **ALONE).token_ids
    spoil(client, VOCABULARY - 1)
    monkeypatch.setattr("loaderd.server.worker.engine.batching.pace._MOST", 150)
    monkeypatch.setattr("loaderd.server.worker.engine.batching.pace._MOST_FREE", 150)
    with monkeypatch.context() as patched:
        gate = Gate(client.model, patched)
        key = client.start([VOCABULARY - 1, *LONG], max_new_tokens=5, bypass_prefix_cache=True)
        assert gate.entered.wait(TIMEOUT)
        client.engine.cancel(key)
        gate.open.set()
        assert client.wait(key).finish.reason == FinishReason.FINISH_REASON_CANCELLED
    # The first one gets its slot; beside a longer one, what is masked takes part in products.
    short = client.start(max_new_tokens=40, **unspoiled, **ALONE)
    client.start(LONG, max_new_tokens=40, **unspoiled, **ALONE)
    assert client.wait(short).error is None
    assert client.wait(short).token_ids == expected


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_time_runs_out_also_while_the_prompt_is_computed(
    client: Client, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loaderd.server.worker.engine.batching.pace._MOST", 16)
    monkeypatch.setattr("loaderd.server.worker.engine.batching.pace._MOST_FREE", 16)
    before_each_pass(client.model, monkeypatch, lambda _: time.sleep(0.05))
    outputs = client.generate(
        LONG, max_new_tokens=5, max_time=timedelta(seconds=0.08), ignore_eos=True, **options
    )
    assert outputs.finish.reason == FinishReason.FINISH_REASON_TIME
    assert outputs.finished is not None
    assert outputs.finished.usage.generated_tokens == 0
    assert len(client.generate(PROMPT, max_new_tokens=4, **GREEDY).token_ids) == 4


def test_beams_of_a_job_that_failed_are_not_computed(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []

    def fail(positions: torch.Tensor) -> None:
        passes.append(positions.numel())
        if positions.max() >= len(PROMPT):
            raise MemoryError

    before_each_pass(client.model, monkeypatch, fail)
    outputs = client.generate(num_beams=2, max_new_tokens=5)
    assert outputs.error is not None
    # The prompt, both beams together, and the first of them alone.
    assert passes == [len(PROMPT), 2, 1]
