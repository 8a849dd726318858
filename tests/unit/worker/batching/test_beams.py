"""Beams are those of transformers, alone and among others, whatever the attention."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest

from loaderd.server.worker.engine.batching.build import EngineSettings
from loaderd.v1.errors_pb2 import ErrorReason
from loaderd.v1.generation_pb2 import FinishReason, StreamGenerateRequest, TokenIds
from tests.unit.worker.batching.beams import outputs_by_index, reference_beams
from tests.unit.worker.batching.test_architectures import ARCHITECTURES, PROMPTS
from tests.unit.worker.engine_client import (
    EOS,
    PROMPT,
    TIMEOUT,
    VOCABULARY,
    Client,
    Gate,
    before_each_pass,
    build,
)

SOME = PROMPTS[1:6]
LONG = random.Random(4).choices(range(2, VOCABULARY), k=100)
PENALTIES: dict[str, Any] = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
SEARCHES: list[dict[str, Any]] = [
    {"num_beams": 2},
    {"num_beams": 3, "n": 2, "early_stopping": True},
    {"num_beams": 4, "n": 4, "length_penalty": 0.0},
    {"num_beams": 5, "n": 3, "length_penalty": 2.0},
    {"num_beams": 4, "n": 3, "length_penalty": -1.0, "early_stopping": True},
    {"num_beams": 3, "n": 3, **PENALTIES},
]


@pytest.fixture(scope="module", params=["llama", "qwen3", "mistral", "gpt2", "gpt_oss", "mixtral"])
def models(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The same model twice: for transformers and for the engine."""
    model = build(request.param, **ARCHITECTURES[request.param])
    return model, copy.deepcopy(model)


@pytest.fixture(scope="module")
def client(models: tuple[Any, Any]) -> Iterator[Client]:
    client = Client(models[1], "batching")
    yield client
    client.engine.close()


def ending(model: Any, prompt: list[int]) -> list[int]:
    """Tokens that come early in good outputs, so that they end some."""
    beams = reference_beams(model, prompt, max_new_tokens=12, num_beams=5, n=5, eos_token_id=None)
    return sorted({beam[place] for beam, place in zip(beams, (2, 4, 3, 5, 7), strict=True)})[:2]


@pytest.fixture(scope="module")
def endings(models: tuple[Any, Any]) -> list[list[int]]:
    """What ends outputs early, for each of `SOME`."""
    return [ending(models[0], prompt) for prompt in SOME]


def search(client: Client, prompt: list[int], **options: Any) -> list[list[int]]:
    asked = {"bypass_prefix_cache": True, "return_token_ids": True} | options
    return outputs_by_index(client.generate(prompt, **asked))


@pytest.mark.parametrize("options", SEARCHES)
@pytest.mark.parametrize("ends", [False, True])
def test_alone(
    client: Client,
    models: tuple[Any, Any],
    endings: list[list[int]],
    options: dict[str, Any],
    ends: bool,
) -> None:
    lengths = set[int]()
    for prompt, stops in zip(SOME, endings if ends else [[]] * len(SOME), strict=True):
        expected = reference_beams(
            models[0], prompt, max_new_tokens=14, eos_token_id=[EOS, *stops], **options
        )
        own = search(client, prompt, max_new_tokens=14, stop_token_ids=stops, **options)
        assert own == expected
        lengths |= {len(output) for output in own}
    if ends and options.get("length_penalty", 1.0) <= 1:
        assert min(lengths) < 14, "nothing ended early"


def test_beside_others(client: Client, models: tuple[Any, Any]) -> None:
    asked: dict[str, Any] = {
        "bypass_prefix_cache": True,
        "return_token_ids": True,
        "max_new_tokens": 14,
    }
    alone = [client.generate(prompt, do_sample=False, **asked).token_ids for prompt in PROMPTS]
    searches = list(zip(PROMPTS, itertools.cycle(SEARCHES)))
    keys = [
        (
            client.start(prompt, do_sample=False, **asked),
            client.start(prompt, **asked, **options),
        )
        for prompt, options in searches
    ]
    for (greedy, beams), (prompt, options), expected in zip(keys, searches, alone, strict=True):
        assert client.wait(greedy).token_ids == expected
        assert outputs_by_index(client.wait(beams)) == reference_beams(
            models[0], prompt, max_new_tokens=14, **options
        )


@pytest.mark.parametrize("chunk", [1, 7])
def test_in_small_pieces(
    client: Client, models: tuple[Any, Any], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loaderd.server.worker.engine.batching.pace._MOST", chunk)
    monkeypatch.setattr("loaderd.server.worker.engine.batching.pace._MOST_FREE", chunk)
    monkeypatch.setattr("loaderd.server.worker.engine.batching.pace._LEAST", chunk)
    options: dict[str, Any] = {"max_new_tokens": 10, "num_beams": 4, "n": 2}
    asked = {"bypass_prefix_cache": True, "return_token_ids": True} | options
    keys = [client.start(prompt, **asked) for prompt in PROMPTS[:4]]
    for key, prompt in zip(keys, PROMPTS, strict=False):
        expected = reference_beams(models[0], prompt, **options)
        assert outputs_by_index(client.wait(key)) == expected


def test_with_a_prefix_that_is_known(client: Client, models: tuple[Any, Any]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 10, "num_beams": 4, "n": 2}
    expected = reference_beams(models[0], LONG, **options)
    for cached in (0, 96):
        outputs = client.generate(LONG, cache_salt="s", return_token_ids=True, **options)
        assert outputs.finished is not None
        assert outputs.finished.usage.cached_prompt_tokens == cached
        assert outputs_by_index(outputs) == expected


@pytest.fixture(scope="module")
def plain() -> Any:
    return build("llama")


@pytest.fixture(scope="module")
def llama(plain: Any) -> Iterator[Client]:
    client = Client(copy.deepcopy(plain), "batching")
    yield client
    client.engine.close()


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("early", [False, True])
def test_every_number_of_outputs(
    llama: Client, plain: Any, count: int, penalty: float, early: bool
) -> None:
    options: dict[str, Any] = {
        "num_beams": count,
        "length_penalty": penalty,
        "early_stopping": early,
        "max_new_tokens": 40,
    }
    stops = ending(plain, PROMPT)
    expected = reference_beams(plain, PROMPT, eos_token_id=[EOS, *stops], n=count, **options)
    for n in range(1, count + 1):
        assert search(llama, PROMPT, stop_token_ids=stops, n=n, **options) == expected[:n]


def test_long_outputs_with_penalties(llama: Client, plain: Any) -> None:
    options: dict[str, Any] = {"num_beams": 4, "n": 4, "max_new_tokens": 80, **PENALTIES}
    assert search(llama, PROMPT, **options) == reference_beams(plain, PROMPT, **options)


def test_min_new_tokens_holds_every_end_back(llama: Client, plain: Any) -> None:
    options: dict[str, Any] = {"num_beams": 3, "n": 3, "max_new_tokens": 20}
    (eos, stop) = ending(plain, PROMPT)
    model = copy.deepcopy(plain)
    model.generation_config.eos_token_id = eos
    client = Client(model, "batching")
    expected = reference_beams(plain, PROMPT, eos_token_id=eos, min_new_tokens=9, **options)
    assert search(client, PROMPT, min_new_tokens=9, **options) == expected
    free = search(client, PROMPT, stop_token_ids=[stop], **options)
    held = search(client, PROMPT, stop_token_ids=[stop], min_new_tokens=9, **options)
    client.engine.close()
    assert min(map(len, free)) < 9 <= min(map(len, held))


def test_finishes_say_what_ended_each_output_and_all_come_at_the_end(
    llama: Client, plain: Any
) -> None:
    stops = ending(plain, PROMPT)
    outputs = llama.generate(
        PROMPT, num_beams=5, n=5, max_new_tokens=8, stop_token_ids=stops, return_token_ids=True,
        echo=True, length_penalty=0.0, skip_special_tokens=False,
    )  # fmt: skip
    assert outputs.finished is not None
    tokens = outputs_by_index(outputs)
    for finish, own in zip(outputs.finished.finishes, tokens, strict=True):
        if own[-1] in stops:
            assert (finish.reason, finish.stop_token_id) == (
                FinishReason.FINISH_REASON_STOP,
                own[-1],
            )
        else:
            assert len(own) == 8
            assert finish.reason == FinishReason.FINISH_REASON_LENGTH
    assert {finish.reason for finish in outputs.finished.finishes} == {
        FinishReason.FINISH_REASON_STOP,
        FinishReason.FINISH_REASON_LENGTH,
    }
    assert outputs.finished.usage.generated_tokens == sum(map(len, tokens))
    texts = ["".join(d.text for d in outputs.deltas if d.index == index) for index in range(5)]
    begin = "".join(f" {token}" for token in PROMPT)
    assert texts == [begin + "".join(f" {token}" for token in own) for own in tokens]


def test_masks_apply_to_beams(llama: Client) -> None:
    outputs = search(
        llama, PROMPT, num_beams=4, n=4, max_new_tokens=6, no_repeat_ngram_size=1,
        allowed_token_ids=TokenIds(ids=range(40, 50)), presence_penalty=0.5, logit_bias={41: 2.0},
    )  # fmt: skip
    assert len({tuple(output) for output in outputs}) == 4
    for output in outputs:
        assert set(output) <= set(range(40, 50))
        assert len(set(output)) == 6


@pytest.mark.parametrize(
    ("allowed", "length", "n", "field"),
    [([7, 8], 9, 1, "allowed_token_ids"), ([7], 1, 2, "n"), ([7, 8], 2, 3, "n")],
)
def test_masks_that_leave_too_little_fail_their_request_alone(
    llama: Client, allowed: list[int], length: int, n: int, field: str
) -> None:
    other = llama.start(max_new_tokens=20, do_sample=False, ignore_eos=True)
    outputs = llama.generate(
        num_beams=3, n=n, allowed_token_ids=TokenIds(ids=allowed), no_repeat_ngram_size=1,
        max_new_tokens=length,
    )  # fmt: skip
    assert outputs.error is not None
    assert outputs.error.reason == ErrorReason.ERROR_REASON_INVALID_ARGUMENT
    assert outputs.error.metadata["field"] == field
    assert llama.wait(other).finished is not None


def test_fewer_tokens_than_beams_are_enough_for_fewer_outputs(llama: Client) -> None:
    asked: dict[str, Any] = {"num_beams": 5, "max_new_tokens": 4}
    outputs = search(llama, PROMPT, n=5, allowed_token_ids=TokenIds(ids=[7, 8]), **asked)
    assert len({tuple(output) for output in outputs}) == 5
    assert {token for output in outputs for token in output} == {7, 8}


def test_logits_that_are_no_numbers_fail_the_search(
    llama: Client, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(
            llama.model.lm_head.weight, "data", llama.model.lm_head.weight * float("nan")
        )
        outputs = llama.generate(num_beams=3, max_new_tokens=4, bypass_prefix_cache=True)
    assert outputs.error is not None
    assert outputs.error.reason == ErrorReason.ERROR_REASON_INTERNAL
    expected = reference_beams(plain, PROMPT, num_beams=3, max_new_tokens=4)
    assert search(llama, PROMPT, num_beams=3, max_new_tokens=4) == expected


def test_time_runs_out(llama: Client, plain: Any) -> None:
    request = StreamGenerateRequest()
    request.max_time.FromNanoseconds(1)
    outputs = llama.generate(
        num_beams=3, n=2, max_new_tokens=100, max_time=request.max_time, return_token_ids=True
    )
    assert outputs.finished is not None
    reasons = [finish.reason for finish in outputs.finished.finishes]
    assert reasons == [FinishReason.FINISH_REASON_TIME] * 2
    expected = reference_beams(plain, PROMPT, n=2, num_beams=3, max_new_tokens=1)
    assert outputs_by_index(outputs) == expected


def test_log_probabilities_of_the_prompt_can_be_had(llama: Client) -> None:
    outputs = llama.generate(LONG, num_beams=2, prompt_logprobs=1, max_new_tokens=2)
    assert [told.token_id for told in outputs.prompt_logprobs] == LONG[1:]


@pytest.mark.parametrize("prompt", [PROMPT, LONG])
def test_a_cancel_gives_the_best_so_far_and_leaves_no_slot_behind(
    plain: Any, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(copy.deepcopy(plain), "batching", settings=EngineSettings(max_slots=5))
    gate = Gate(client.model, monkeypatch)
    passes = itertools.count(1)
    before_each_pass(
        client.model,
        monkeypatch,
        lambda _: client.engine.cancel(1) if next(passes) == 4 else None,
    )
    key = client.start(prompt, num_beams=4, n=2, max_new_tokens=100, return_token_ids=True)
    gate.open.set()
    outputs = client.wait(key)
    assert outputs.finished is not None
    reasons = [finish.reason for finish in outputs.finished.finishes]
    assert reasons == [FinishReason.FINISH_REASON_CANCELLED] * 2
    expected = reference_beams(plain, prompt, n=2, num_beams=4, max_new_tokens=4, eos_token_id=None)
    assert outputs_by_index(outputs) == expected
    assert client.generate(num_beams=5, max_new_tokens=3).finished is not None
    client.engine.close()


def test_a_cancel_before_the_first_token_gives_empty_outputs(
    llama: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loaderd.server.worker.engine.batching.pace._MOST", 16)
    monkeypatch.setattr("loaderd.server.worker.engine.batching.pace._MOST_FREE", 16)
    gate = Gate(llama.model, monkeypatch)
    options: dict[str, Any] = {"bypass_prefix_cache": True, "echo": True}
    key = llama.start(LONG, num_beams=3, n=2, max_new_tokens=5, **options)
    assert gate.entered.wait(TIMEOUT)
    llama.engine.cancel(key)
    gate.open.set()
    outputs = llama.wait(key)
    assert outputs.finished is not None
    reasons = [finish.reason for finish in outputs.finished.finishes]
    assert reasons == [FinishReason.FINISH_REASON_CANCELLED] * 2
    assert outputs.finished.usage.generated_tokens == 0
    assert outputs.deltas == [], "the prompt was not computed"


def test_a_failed_step_fails_the_search_and_no_other(
    llama: Client, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(positions: Any) -> None:
        if positions.max() >= 60:
            raise MemoryError

    before_each_pass(llama.model, monkeypatch, fail)
    bad = llama.start(LONG[:55], num_beams=4, max_new_tokens=20, ignore_eos=True)
    good = llama.start(PROMPT, num_beams=4, max_new_tokens=20, return_token_ids=True)
    outputs = llama.wait(bad)
    assert outputs.error is not None
    assert outputs.error.reason == ErrorReason.ERROR_REASON_DEVICE_MEMORY
    expected = reference_beams(plain, PROMPT, num_beams=4, max_new_tokens=20)
    assert outputs_by_index(llama.wait(good)) == expected
