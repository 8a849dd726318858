"""What the batching engine does that the sequential one does not."""

from __future__ import annotations

import copy
import random
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from loaderd.server.errors import InvalidArgumentError, QueueFullError
from loaderd.server.worker import devices
from loaderd.server.worker.engine.batching.build import EngineSettings
from loaderd.v1.errors_pb2 import ErrorReason
from loaderd.v1.generation_pb2 import FinishReason, TokenIds
from tests.unit.worker.engine_client import (
    CONTEXT,
    PROMPT,
    TIMEOUT,
    VOCABULARY,
    Client,
    Gate,
    before_each_pass,
    build,
    reference,
)

LONG = random.Random(4).choices(range(2, VOCABULARY), k=200)
GREEDY: dict[str, Any] = {"do_sample": False, "ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def plain() -> Any:
    """The model as transformers runs it."""
    return build("llama")


@pytest.fixture(scope="module")
def client(plain: Any) -> Iterator[Client]:
    client = Client(copy.deepcopy(plain), "batching")
    yield client
    client.engine.close()


def limited(plain: Any, **settings: Any) -> Client:
    return Client(copy.deepcopy(plain), "batching", settings=EngineSettings(**settings))


def test_requests_come_and_go_and_each_has_its_own_tokens(client: Client, plain: Any) -> None:
    numbers = random.Random(1)
    prompts = [numbers.choices(range(2, VOCABULARY), k=numbers.randint(1, 60)) for _ in range(100)]
    lengths = [numbers.randint(1, 20) for _ in prompts]
    keys = [
        client.start(prompt, max_new_tokens=length, **GREEDY)
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    for key, prompt, length in zip(keys, prompts, lengths, strict=True):
        expected = reference(
            plain, prompt, do_sample=False, max_new_tokens=length, eos_token_id=None
        )
        assert client.wait(key).token_ids == expected


def test_a_seed_gives_the_same_tokens_alone_and_beside_others(client: Client) -> None:
    options: dict[str, Any] = {
        "temperature": 1.5,
        "top_p": 0.95,
        "seed": 11,
        "max_new_tokens": 30,
        "ignore_eos": True,
    }
    alone = client.token_ids(**options)
    others = [client.start(LONG[:n], temperature=2.0, max_new_tokens=30) for n in range(1, 16)]
    beside = client.token_ids(**options)
    for key in others:
        client.wait(key)
    assert alone == beside
    assert alone != client.token_ids(**options | {"seed": 12})


def test_a_step_is_one_message_for_all(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(client.model, monkeypatch)
    keys = [client.start(max_new_tokens=1, **GREEDY)]
    assert gate.entered.wait(TIMEOUT)
    keys += [client.start([*PROMPT, n], max_new_tokens=10, **GREEDY) for n in range(2, 10)]
    before = client.steps
    gate.open.set()
    for key in keys:
        client.wait(key)
    assert client.steps - before <= 1 + 10


def test_completions_of_one_request_share_its_prompt(client: Client) -> None:
    options: dict[str, Any] = {
        "temperature": 1.5,
        "seed": 5,
        "max_new_tokens": 8,
        "ignore_eos": True,
    }
    outputs = client.generate(LONG, n=3, return_token_ids=True, **options)
    assert outputs.finished is not None
    assert outputs.finished.usage.generated_tokens == 24
    assert outputs.finished.usage.prompt_tokens == len(LONG)
    assert len(outputs.finished.finishes) == 3
    texts = [
        [token for delta in outputs.deltas if delta.index == index for token in delta.token_ids]
        for index in range(3)
    ]
    assert len({tuple(text) for text in texts}) == 3
    for index, text in enumerate(texts):
        single = options | {"seed": 5 + index}
        assert client.token_ids(LONG, **single) == text


def test_a_known_prefix_is_not_computed_again(client: Client, plain: Any) -> None:
    first = client.generate(LONG, max_new_tokens=5, cache_salt="known", **GREEDY)
    expected = reference(
        plain, [*LONG[:100], 7], do_sample=False, max_new_tokens=5, eos_token_id=None
    )
    second = client.generate([*LONG[:100], 7], max_new_tokens=5, cache_salt="known", **GREEDY)
    assert first.finished is not None
    assert second.finished is not None
    assert first.finished.usage.cached_prompt_tokens == 0
    assert second.finished.usage.cached_prompt_tokens == 96
    assert second.token_ids == expected


def test_the_next_turn_of_a_chat_knows_the_answer_of_the_last(client: Client, plain: Any) -> None:
    prompt = LONG[:40]
    answer = client.generate(prompt, max_new_tokens=40, cache_salt="chat", **GREEDY).token_ids
    chat = [*prompt, *answer, 5, 6]
    outputs = client.generate(chat, max_new_tokens=5, cache_salt="chat", **GREEDY)
    assert outputs.finished is not None
    assert outputs.finished.usage.cached_prompt_tokens == 64
    assert outputs.token_ids == reference(
        plain, chat, do_sample=False, max_new_tokens=5, eos_token_id=None
    )


@pytest.mark.parametrize("options", [{"bypass_prefix_cache": True}, {"cache_salt": "other"}])
def test_prefixes_can_be_kept_apart(client: Client, options: dict[str, Any]) -> None:
    client.generate(LONG, max_new_tokens=1, **GREEDY)
    outputs = client.generate(LONG, max_new_tokens=1, **GREEDY, **options)
    assert outputs.finished is not None
    assert outputs.finished.usage.cached_prompt_tokens == 0


def test_a_request_is_cancelled_while_its_prompt_is_computed(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loaderd.server.worker.engine.batching.pace._MOST", 16)
    monkeypatch.setattr("loaderd.server.worker.engine.batching.pace._MOST_FREE", 16)
    gate = Gate(client.model, monkeypatch)
    key = client.start(LONG, max_new_tokens=5, bypass_prefix_cache=True)
    assert gate.entered.wait(TIMEOUT)
    client.engine.cancel(key)
    gate.open.set()
    outputs = client.wait(key)
    assert outputs.finish.reason == FinishReason.FINISH_REASON_CANCELLED
    assert outputs.finished is not None
    assert outputs.finished.usage.generated_tokens == 0


@pytest.mark.parametrize("prompt", [PROMPT, LONG])
def test_all_completions_of_a_request_are_cancelled(
    client: Client, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(client.model, monkeypatch)
    key = client.start(prompt, n=3, temperature=1.0, max_new_tokens=50, ignore_eos=True)
    assert gate.entered.wait(TIMEOUT)
    client.engine.cancel(key)
    gate.open.set()
    outputs = client.wait(key)
    assert outputs.finished is not None
    reasons = [finish.reason for finish in outputs.finished.finishes]
    assert reasons == [FinishReason.FINISH_REASON_CANCELLED] * 3
    assert len(client.generate(max_new_tokens=4, **GREEDY).token_ids) == 4


def test_a_failed_step_fails_only_those_that_fail_alone(
    client: Client, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(positions: torch.Tensor) -> None:
        if positions.max() >= 60:
            raise MemoryError

    gate = Gate(client.model, monkeypatch)
    first = client.start(max_new_tokens=1, **GREEDY)
    assert gate.entered.wait(TIMEOUT)
    before_each_pass(client.model, monkeypatch, fail)
    good = [client.start(LONG[:n], max_new_tokens=5, **GREEDY) for n in (3, 9)]
    bad = client.start(LONG[:61], max_new_tokens=5, bypass_prefix_cache=True)
    gate.open.set()
    client.wait(first)
    outputs = client.wait(bad)
    assert outputs.error is not None
    assert outputs.error.reason == ErrorReason.ERROR_REASON_DEVICE_MEMORY
    for key, n in zip(good, (3, 9), strict=True):
        expected = reference(plain, LONG[:n], do_sample=False, max_new_tokens=5, eos_token_id=None)
        assert client.wait(key).token_ids == expected


def test_memory_of_a_failed_step_is_free_before_it_is_given_back(
    plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    still_held: list[bool] = []

    def fail(_positions: torch.Tensor) -> None:
        tensor = torch.empty(1)
        held.append(weakref.ref(tensor))
        raise MemoryError

    client = limited(plain)
    before_each_pass(client.model, monkeypatch, fail)
    monkeypatch.setattr(
        devices, "release_cached_memory", lambda: still_held.append(held[-1]() is not None)
    )
    assert client.generate(max_new_tokens=3).error is not None
    client.engine.close()
    assert still_held == [False]


def test_what_a_failed_request_left_spoils_no_other(plain: Any) -> None:
    model = copy.deepcopy(plain)
    with torch.no_grad():
        model.get_input_embeddings().weight[96] = torch.nan
    client = Client(model, "batching")
    prompts = [[token for token in LONG if token != 96][:n] for n in (3, 50)]
    outputs = client.generate([96] * 60, max_new_tokens=5)
    assert outputs.error is not None
    keys = [client.start(prompt, max_new_tokens=9, **GREEDY) for prompt in prompts]
    for key, prompt in zip(keys, prompts, strict=True):
        expected = reference(plain, prompt, do_sample=False, max_new_tokens=9, eos_token_id=None)
        outputs = client.wait(key)
        assert outputs.error is None
        assert outputs.token_ids == expected
    client.engine.close()


def test_a_failed_request_frees_only_what_it_still_has(
    plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of its completions has ended, and another request is in that one's slot."""

    def fail(positions: torch.Tensor) -> None:
        if positions.max() >= 70:
            raise MemoryError

    client = limited(plain, max_slots=2, max_memory_bytes=56 * 2**10, prefix_share=0.0)
    sampled: dict[str, Any] = {"n": 2, "seed": 3, "temperature": 2.0, "ignore_eos": True}
    trial = client.generate(LONG[:40], max_new_tokens=40, return_token_ids=True, **sampled)
    rows = [[t for d in trial.deltas if d.index == i for t in d.token_ids] for i in range(2)]
    stop = next(token for token in rows[1] if token not in rows[0])
    assert rows[1].index(stop) < 20
    before_each_pass(client.model, monkeypatch, fail)
    bad = client.start(LONG[:40], max_new_tokens=40, stop_token_ids=[stop], **sampled)
    other = client.start(LONG[:9], max_new_tokens=50, **GREEDY)
    assert client.wait(bad).error is not None
    expected = reference(plain, LONG[:9], do_sample=False, max_new_tokens=50, eos_token_id=None)
    assert client.wait(other).token_ids == expected
    client.engine.close()


def test_masks_that_leave_nothing_fail_their_request_alone(client: Client) -> None:
    other = client.start(max_new_tokens=20, **GREEDY)
    outputs = client.generate(
        allowed_token_ids=TokenIds(ids=[7]), no_repeat_ngram_size=1, max_new_tokens=9
    )
    assert outputs.error is not None
    assert outputs.error.reason == ErrorReason.ERROR_REASON_INVALID_ARGUMENT
    assert len(client.wait(other).token_ids) == 20


def test_what_can_never_fit_is_refused_at_once(plain: Any) -> None:
    client = limited(plain, max_memory_bytes=100 * 2**10, prefix_share=0.0)
    with pytest.raises(InvalidArgumentError, match="there is room for"):
        client.start(LONG, n=2, max_new_tokens=CONTEXT - len(LONG))
    assert client.generate(max_new_tokens=3, ignore_eos=True).finished is not None
    client.engine.close()


def test_more_than_fit_wait_for_their_turn_and_know_their_place(
    plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loaderd.server.worker.engine.reception._TELL_SECONDS", 0.0)
    client = limited(plain, max_slots=2)
    gate = Gate(client.model, monkeypatch)
    keys = [client.start(max_new_tokens=6, **GREEDY)]
    assert gate.entered.wait(TIMEOUT)
    keys += [client.start(max_new_tokens=6, **GREEDY) for _ in range(5)]
    gate.open.set()
    outputs = [client.wait(key) for key in keys]
    assert len({tuple(one.token_ids) for one in outputs}) == 1
    assert outputs[0].positions == outputs[1].positions == []
    assert [one.positions[0] for one in outputs[2:]] == [0, 1, 2, 3]
    assert outputs[5].positions == sorted(outputs[5].positions, reverse=True)
    client.engine.close()


def test_a_full_queue_refuses(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = limited(plain, max_slots=1, max_queue=2)
    gate = Gate(client.model, monkeypatch)
    keys = [client.start(max_new_tokens=2)]
    assert gate.entered.wait(TIMEOUT)
    keys += [client.start(max_new_tokens=2) for _ in range(2)]
    with pytest.raises(QueueFullError):
        client.start(max_new_tokens=2)
    gate.open.set()
    for key in keys:
        assert client.wait(key).finished is not None
    client.engine.close()


def test_nothing_is_left_after_many_requests_and_cancels(plain: Any) -> None:
    client = limited(plain, max_slots=5)
    numbers = random.Random(2)

    def some() -> None:
        for _ in range(40):
            prompt = numbers.choices(range(2, VOCABULARY), k=numbers.randint(1, 50))
            key = client.start(
                prompt, max_new_tokens=numbers.randint(1, 20), n=numbers.randint(1, 3)
            )
            if numbers.random() < 0.5:
                client.engine.cancel(key)
            ended.append(key)

    ended: list[int] = []
    thread = threading.Thread(target=some)
    thread.start()
    thread.join(TIMEOUT)
    for key in ended:
        assert client.wait(key).finished is not None
    # All five slots are free: five completions run at once.
    outputs = client.generate(max_new_tokens=CONTEXT - len(PROMPT), n=5, temperature=1.0)
    assert outputs.finished is not None
    client.engine.close()
