"""What every engine promises."""

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from loaderd.server.errors import InvalidArgumentError
from loaderd.server.worker.engine.batching.build import EngineSettings
from loaderd.v1.errors_pb2 import ErrorReason
from loaderd.v1.generation_pb2 import FinishReason, StreamGenerateRequest, TokenIds
from tests.unit.worker.batching.beams import outputs_by_index, reference_beams
from tests.unit.worker.engine_client import (
    EOS,
    PROMPT,
    TIMEOUT,
    Client,
    Gate,
    build,
    fail_once,
)


@pytest.fixture(scope="module", params=["sequential", "batching"])
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def own() -> Any:
    """The model as transformers runs it."""
    return build("llama")


@pytest.fixture(scope="module")
def llama(engine: str) -> Iterator[Client]:
    client = Client(build("llama"), engine)
    yield client
    client.engine.close()


def test_usage_and_timings_add_up(llama: Client) -> None:
    outputs = llama.generate(max_new_tokens=5, ignore_eos=True)
    assert outputs.started is not None
    assert outputs.finished is not None
    assert outputs.started.prompt_tokens == outputs.finished.usage.prompt_tokens == len(PROMPT)
    assert outputs.started.request_id.startswith("r")
    assert outputs.finished.usage.generated_tokens == 5
    assert outputs.finish.reason == FinishReason.FINISH_REASON_LENGTH
    timings = outputs.finished.timings
    queue, prefill = timings.queue.ToNanoseconds(), timings.prefill.ToNanoseconds()
    assert queue >= 0
    assert prefill > 0
    assert timings.decode.ToNanoseconds() > 0
    assert timings.time_to_first_token.ToNanoseconds() == pytest.approx(queue + prefill, abs=2)


def test_every_token_is_sent_when_it_is_there(llama: Client) -> None:
    outputs = llama.generate(max_new_tokens=8, ignore_eos=True)
    assert len(outputs.deltas) == 8


def test_min_new_tokens_holds_the_end_of_sequence_back(llama: Client) -> None:
    free = llama.token_ids(do_sample=False, max_new_tokens=200)
    assert EOS not in free[:4], "the model ends too soon for this test"
    stop = free[3]
    assert llama.token_ids(do_sample=False, stop_token_ids=[stop])[-1] == stop
    held = llama.generate(do_sample=False, stop_token_ids=[stop], min_new_tokens=9)
    assert held.finished is not None
    assert held.finished.usage.generated_tokens >= 9


def test_time_runs_out_between_tokens(llama: Client) -> None:
    request = StreamGenerateRequest(max_new_tokens=200, ignore_eos=True)
    request.max_time.FromNanoseconds(1)
    outputs = llama.generate(max_new_tokens=200, ignore_eos=True, max_time=request.max_time)
    assert outputs.finish.reason == FinishReason.FINISH_REASON_TIME
    assert outputs.finished is not None
    assert outputs.finished.usage.generated_tokens == 1


def test_completions_have_seeds_that_follow_one_another(llama: Client) -> None:
    options: dict[str, Any] = {"temperature": 1.5, "max_new_tokens": 8, "ignore_eos": True}
    outputs = llama.generate(n=3, seed=2**64 - 2, return_token_ids=True, **options)
    assert outputs.finished is not None
    assert outputs.finished.usage.generated_tokens == 24
    tokens = outputs_by_index(outputs)
    assert len({tuple(one) for one in tokens}) == 3
    singles = [llama.token_ids(seed=seed, **options) for seed in (2**64 - 2, 2**64 - 1, 0)]
    assert tokens == singles


def test_the_best_of_several_are_given_best_first(llama: Client) -> None:
    options: dict[str, Any] = {"temperature": 2.0, "seed": 3, "max_new_tokens": 6}
    options |= {"ignore_eos": True, "return_token_ids": True}
    every = llama.generate(n=6, logprobs=True, **options)
    best = llama.generate(n=2, best_of=6, **options)
    assert best.finished is not None
    assert best.finished.usage.generated_tokens == 36
    assert not any(delta.logprobs for delta in best.deltas), "they were not asked for"
    scores = [
        sum(told.logprob for delta in every.deltas if delta.index == index
            for told in delta.logprobs)
        for index in range(6)
    ]  # fmt: skip
    ranked = sorted(zip(scores, outputs_by_index(every), strict=True), reverse=True)
    assert outputs_by_index(best) == [tokens for _, tokens in ranked[:2]]


def test_log_probabilities_of_the_prompt_are_those_of_the_model(llama: Client, own: Any) -> None:
    prompt = [*PROMPT * 30, 7]
    with torch.no_grad():
        logprobs = own(torch.tensor([prompt])).logits[0].log_softmax(-1)
    outputs = llama.generate(prompt, prompt_logprobs=2, max_new_tokens=1)
    told = outputs.prompt_logprobs
    assert [one.token_id for one in told] == prompt[1:]
    assert [one.logprob for one in told] == pytest.approx(
        [float(logprobs[place, token]) for place, token in enumerate(prompt[1:])], abs=1e-4
    )
    assert [top.token_id for top in told[0].top] == logprobs[0].topk(2).indices.tolist()
    assert llama.generate([5], prompt_logprobs=2, max_new_tokens=1).prompt_logprobs == []


def test_beams_of_both_engines_are_alike(llama: Client, own: Any) -> None:
    options: dict[str, Any] = {"num_beams": 4, "n": 3, "max_new_tokens": 15}
    outputs = llama.generate(return_token_ids=True, **options)
    assert outputs_by_index(outputs) == reference_beams(own, PROMPT, **options)


def test_masks_that_leave_too_few_outputs_are_refused(llama: Client) -> None:
    outputs = llama.generate(
        num_beams=3, n=3, allowed_token_ids=TokenIds(ids=[7, 8]), no_repeat_ngram_size=1,
        max_new_tokens=2,
    )  # fmt: skip
    assert outputs.error is not None
    assert outputs.error.metadata["field"] == "n"


class HalfCharacters:
    """A tokenizer in which the prompt's last token is the first byte of a character."""

    def decode(self, token_ids: list[int], **_: Any) -> str:
        content = b"".join(b"\xc3" if token == PROMPT[-1] else b"a" for token in token_ids)
        return content.decode(errors="replace")


def test_beams_that_are_not_given_show_nothing(engine: str) -> None:
    client = Client(build("llama"), engine, decoder=HalfCharacters())
    outputs = client.generate(num_beams=4, n=2, max_new_tokens=5, ignore_eos=True)
    client.engine.close()
    assert outputs.finished is not None
    assert {delta.index for delta in outputs.deltas} == {0, 1}


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"num_beams": 4, "n": 2}, "num_beams"),
        ({"best_of": 4, "n": 2}, "best_of"),
        ({"n": 4}, "n"),
    ],
)
def test_more_completions_than_slots_are_refused_by_their_name(
    asked: dict[str, Any], field: str
) -> None:
    client = Client(build("llama"), "batching", settings=EngineSettings(max_slots=3))
    with pytest.raises(InvalidArgumentError, match="must be at most 3") as refused:
        client.start(max_new_tokens=5, **asked)
    client.engine.close()
    assert refused.value.metadata["field"] == field


def test_a_search_without_time_gives_what_it_has(llama: Client, own: Any) -> None:
    request = StreamGenerateRequest()
    request.max_time.FromNanoseconds(1)
    options: dict[str, Any] = {"max_time": request.max_time, "return_token_ids": True}
    outputs = llama.generate(num_beams=3, n=2, max_new_tokens=50, **options)
    assert outputs.finished is not None
    reasons = [finish.reason for finish in outputs.finished.finishes]
    assert reasons == [FinishReason.FINISH_REASON_TIME] * 2
    assert outputs_by_index(outputs) == reference_beams(
        own, PROMPT, n=2, num_beams=3, max_new_tokens=1
    )


@pytest.mark.parametrize(
    "options", [{"n": 3}, {"n": 2, "best_of": 3}, {"num_beams": 4, "n": 2, "ignore_eos": True}]
)
def test_all_completions_of_a_request_are_cancelled(
    llama: Client, gate: Gate, options: dict[str, Any]
) -> None:
    key = llama.start(max_new_tokens=200, return_token_ids=True, **options)
    assert gate.entered.wait(TIMEOUT)
    llama.engine.cancel(key)
    gate.open.set()
    outputs = llama.wait(key)
    assert outputs.finished is not None
    reasons = [finish.reason for finish in outputs.finished.finishes]
    assert reasons == [FinishReason.FINISH_REASON_CANCELLED] * options["n"]
    assert len(outputs_by_index(outputs)[0]) == 1


@pytest.fixture
def gate(llama: Client, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(llama.model, monkeypatch)
    yield gate
    gate.open.set()


def test_a_running_request_is_cancelled_before_its_next_token(llama: Client, gate: Gate) -> None:
    key = llama.start(max_new_tokens=200, ignore_eos=True)
    assert gate.entered.wait(TIMEOUT)
    llama.engine.cancel(key)
    gate.open.set()
    outputs = llama.wait(key)
    assert outputs.finish.reason == FinishReason.FINISH_REASON_CANCELLED
    assert outputs.finished is not None
    assert outputs.finished.usage.generated_tokens == 1


def test_a_waiting_request_is_cancelled_at_once(llama: Client, gate: Gate) -> None:
    running = llama.start(max_new_tokens=3, ignore_eos=True)
    assert gate.entered.wait(TIMEOUT)
    cancelled, last = (llama.start(max_new_tokens=3, ignore_eos=True) for _ in range(2))
    llama.engine.cancel(cancelled)
    outputs = llama.wait(cancelled)
    assert outputs.started is None
    assert outputs.finish.reason == FinishReason.FINISH_REASON_CANCELLED
    assert outputs.finished is not None
    assert outputs.finished.usage.generated_tokens == 0
    assert outputs.finished.usage.prompt_tokens == len(PROMPT)
    gate.open.set()
    first, third = llama.wait(running), llama.wait(last)
    assert first.finished is not None
    assert third.finished is not None
    assert third.finished.timings.queue.ToNanoseconds() > 0
    assert third.finish.reason == FinishReason.FINISH_REASON_LENGTH


def test_cancelling_what_has_ended_or_never_was_is_ignored(llama: Client) -> None:
    key = llama.start(max_new_tokens=1)
    llama.wait(key)
    llama.engine.cancel(key)
    llama.engine.cancel(10**6)
    assert llama.generate(max_new_tokens=2, ignore_eos=True).finished is not None


def test_closing_ends_every_request_once(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(build("llama"), engine)
    gate = Gate(client.model, monkeypatch)
    keys = [client.start(max_new_tokens=100, ignore_eos=True)]
    assert gate.entered.wait(TIMEOUT)
    keys += [client.start(max_new_tokens=100, ignore_eos=True) for _ in range(2)]
    closing = threading.Thread(target=client.engine.close)
    closing.start()
    client.wait(keys[-1])
    gate.open.set()
    closing.join(TIMEOUT)
    keys.append(client.start())
    for key in keys:
        assert client.wait(key).finish.reason == FinishReason.FINISH_REASON_CANCELLED


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_fails_the_request_and_nothing_else(
    llama: Client, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    expected = llama.token_ids(do_sample=False, max_new_tokens=5)
    fail_once(llama.model, error, monkeypatch)
    outputs = llama.generate(max_new_tokens=5)
    assert outputs.error is not None
    assert outputs.error.reason == ErrorReason.ERROR_REASON_DEVICE_MEMORY
    assert dict(outputs.error.metadata) == {"model": "org/name"}
    assert llama.token_ids(do_sample=False, max_new_tokens=5) == expected


def test_an_unexpected_error_is_logged_under_its_incident_without_its_text(
    llama: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fail_once(llama.model, RuntimeError("a text that quotes the prompt"), monkeypatch)
    with caplog.at_level(logging.INFO):
        outputs = llama.generate(max_new_tokens=5)
    assert outputs.error is not None
    assert outputs.error.reason == ErrorReason.ERROR_REASON_INTERNAL
    assert outputs.error.metadata["incident"] in caplog.text
    assert "RuntimeError" in caplog.text
    assert "quotes the prompt" not in caplog.text
    assert llama.generate(max_new_tokens=2, ignore_eos=True).finished is not None


def test_requests_from_many_threads_all_end_once(llama: Client) -> None:
    expected = llama.token_ids(do_sample=False, max_new_tokens=4)
    keys: list[int] = []
    lock = threading.Lock()

    def submit() -> None:
        for _ in range(5):
            with lock:
                keys.append(llama.start(do_sample=False, max_new_tokens=4, return_token_ids=True))

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert len(keys) == 20
    assert all(llama.wait(key).token_ids == expected for key in keys)


def test_an_engine_that_can_serve_no_more_says_so(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(build("llama"), engine)
    fail_once(client.model, torch.AcceleratorError("a device-side assert"), monkeypatch)
    client.start()
    assert client.died.wait(TIMEOUT)
