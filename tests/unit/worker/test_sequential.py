import inspect
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from loaderd.server.worker.engine.completion import Tokenizer
from loaderd.server.worker.engine.parameters import typed_request
from loaderd.server.worker.engine.sequential import SequentialEngine
from loaderd.server.worker.facts import model_facts
from loaderd.v1.errors_pb2 import ErrorReason
from loaderd.v1.generation_pb2 import FinishReason, StreamGenerateRequest
from loaderd.worker.v1 import worker_pb2
from tests.unit.worker.outputs import Outputs

TIMEOUT = 60.0
VOCABULARY = 97
EOS = 1
PROMPT = [5, 9, 5, 60, 33]
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 64, "num_key_value_heads": 2, "num_attention_heads": 4},
    "gpt2": {"n_head": 4, "n_inner": 64},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "num_attention_heads": 4},
    "mamba": {"state_size": 8, "num_heads": 4},
}


class Numbers:
    """A tokenizer that writes token ids as numbers."""

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return "".join(f" {token_id}" for token_id in token_ids)


class Client:
    """An engine and what comes out of it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.facts = model_facts(model)
        self._outputs: dict[int, Outputs] = {}
        self._changed = threading.Condition()
        self.died = threading.Event()
        tokenizer = Tokenizer(Numbers(), frozenset({EOS}))
        self.engine = SequentialEngine(
            model, tokenizer, "org/name", self._take, on_death=self.died.set
        )

    def _take(self, outputs: Sequence[worker_pb2.Output]) -> None:
        with self._changed:
            for output in outputs:
                self._outputs[output.key].add(output)
            self._changed.notify_all()

    def start(self, prompt: Sequence[int] = PROMPT, **fields: Any) -> int:
        key = len(self._outputs) + 1
        self._outputs[key] = Outputs()
        request = StreamGenerateRequest(model="m", request_id=f"r{key}", **fields)
        arrived = time.monotonic()
        self.engine.submit(
            typed_request(request, key=key, prompt=prompt, arrived=arrived, facts=self.facts)
        )
        return key

    def wait(self, key: int, condition: Callable[[Outputs], bool] = lambda o: o.ended) -> Outputs:
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self._outputs[key]), TIMEOUT)
            return self._outputs[key]

    def generate(self, prompt: Sequence[int] = PROMPT, **fields: Any) -> Outputs:
        return self.wait(self.start(prompt, **fields))

    def token_ids(self, prompt: Sequence[int] = PROMPT, **fields: Any) -> list[int]:
        return self.generate(prompt, return_token_ids=True, **fields).token_ids


def build(architecture: str) -> Any:
    config = AutoConfig.for_model(
        architecture,
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        initializer_range=1.0 if architecture == "mamba" else 0.3,
        **{"max_position_embeddings": 256} if architecture != "mamba" else {},
        **SIZES[architecture],
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=EOS)
    return model


@pytest.fixture(scope="module", params=SIZES)
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    client = Client(build(request.param))
    yield client
    client.engine.close()


@pytest.fixture(scope="module")
def shared_llama() -> Iterator[Client]:
    client = Client(build("llama"))
    yield client
    client.engine.close()


@pytest.fixture
def llama(shared_llama: Client) -> Iterator[Client]:
    own = shared_llama.model.generation_config.to_dict()
    yield shared_llama
    assert shared_llama.model.generation_config.to_dict() == own, "a request changed the model"


def reference(model: Any, prompt: Sequence[int] = PROMPT, **options: Any) -> list[int]:
    """What transformers generates by itself."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def test_greedy_output_is_that_of_transformers(client: Client) -> None:
    expected = reference(client.model, do_sample=False, max_new_tokens=40)
    outputs = client.generate(do_sample=False, max_new_tokens=40, return_token_ids=True)
    assert outputs.token_ids == expected
    assert len(set(expected)) > 3, "a model that says one thing only proves nothing"


def test_seeded_samples_are_those_of_transformers(client: Client) -> None:
    torch.manual_seed(7)
    options: dict[str, Any] = {
        "temperature": 1.3,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.01,
        "typical_p": 0.98,
    }
    expected = reference(client.model, do_sample=True, max_new_tokens=30, **options)
    assert client.token_ids(seed=7, max_new_tokens=30, **options) == expected


def test_penalties_are_those_of_transformers(llama: Client) -> None:
    options: dict[str, Any] = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
    expected = reference(llama.model, do_sample=False, max_new_tokens=30, **options)
    assert llama.token_ids(do_sample=False, max_new_tokens=30, **options) == expected
    assert expected != reference(llama.model, do_sample=False, max_new_tokens=30)


def test_unset_options_are_the_models_own_as_in_transformers() -> None:
    model = build("llama")
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_p=0.8,
        top_k=9,
        repetition_penalty=1.2,
        eos_token_id=EOS,
    )
    client = Client(model)
    torch.manual_seed(3)
    expected = reference(model, max_new_tokens=30, pad_token_id=EOS)
    assert client.token_ids(seed=3, max_new_tokens=30) == expected
    client.engine.close()


def test_without_own_options_nothing_is_cut_off(llama: Client) -> None:
    """transformers' own default would be the 50 most probable of these 97 tokens."""
    torch.manual_seed(5)
    expected = reference(llama.model, do_sample=True, top_k=0, temperature=5.0, max_new_tokens=40)
    assert llama.token_ids(seed=5, temperature=5.0, max_new_tokens=40) == expected
    torch.manual_seed(5)
    assert reference(llama.model, do_sample=True, temperature=5.0, max_new_tokens=40) != expected


def test_the_options_of_one_request_do_not_reach_the_next(llama: Client) -> None:
    plain = llama.token_ids(do_sample=False, max_new_tokens=20)
    llama.generate(
        temperature=9.0, top_k=2, repetition_penalty=9.0, no_repeat_ngram_size=1,
        min_new_tokens=5, max_new_tokens=9, stop_token_ids=list(range(50)), ignore_eos=True,
    )  # fmt: skip
    assert llama.token_ids(do_sample=False, max_new_tokens=20) == plain


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_seed_gives_the_same_tokens_again_and_is_echoed(llama: Client, seed: int) -> None:
    first = llama.generate(temperature=2.0, seed=seed, max_new_tokens=20, return_token_ids=True)
    second = llama.generate(temperature=2.0, seed=seed, max_new_tokens=20, return_token_ids=True)
    assert first.token_ids == second.token_ids
    assert first.started is not None
    assert first.finished is not None
    assert first.started.seed == first.finished.seed == seed


def test_a_drawn_seed_can_be_given_back(llama: Client) -> None:
    first = llama.generate(temperature=3.0, max_new_tokens=20, return_token_ids=True)
    assert first.started is not None
    again = llama.token_ids(temperature=3.0, max_new_tokens=20, seed=first.started.seed)
    assert again == first.token_ids
    assert llama.token_ids(temperature=3.0, max_new_tokens=20) != again


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


class Gate:
    """Holds the model's forward passes until it is opened."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()
        forward = model.forward

        def gated(*args: Any, **kwargs: Any) -> Any:
            self.entered.set()
            assert self.open.wait(TIMEOUT)
            return forward(*args, **kwargs)

        gated.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        monkeypatch.setattr(model, "forward", gated)


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


def test_requests_run_in_the_order_of_their_arrival_and_can_be_cancelled_before(
    llama: Client, gate: Gate
) -> None:
    running, cancelled, last = (llama.start(max_new_tokens=3, ignore_eos=True) for _ in range(3))
    assert gate.entered.wait(TIMEOUT)
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


def test_closing_ends_every_request_once(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(build("llama"))
    gate = Gate(client.model, monkeypatch)
    keys = [client.start(max_new_tokens=100, ignore_eos=True) for _ in range(3)]
    assert gate.entered.wait(TIMEOUT)
    closing = threading.Thread(target=client.engine.close)
    closing.start()
    client.wait(keys[-1])
    gate.open.set()
    closing.join(TIMEOUT)
    keys.append(client.start())
    for key in keys:
        assert client.wait(key).finish.reason == FinishReason.FINISH_REASON_CANCELLED


def fail_once(model: Any, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = model.forward

    def failing(*_args: Any, **_kwargs: Any) -> Any:
        monkeypatch.setattr(model, "forward", forward)
        raise error

    failing.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "forward", failing)


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


def test_generate_says_nothing(llama: Client, recwarn: pytest.WarningsRecorder) -> None:
    llama.generate(max_new_tokens=3, temperature=0.5, top_k=3)
    llama.generate(max_new_tokens=3, do_sample=False, ignore_eos=True)
    assert [str(warning.message) for warning in recwarn] == []


def test_an_engine_that_can_serve_no_more_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(build("llama"))

    def broken(*_: object, **__: object) -> None:
        raise torch.AcceleratorError("a device-side assert")

    monkeypatch.setattr(client.model, "generate", broken)
    client.start()

    assert client.died.wait(TIMEOUT)
