from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from loaderd.server.errors import QueueFullError
from loaderd.v1.errors_pb2 import ErrorReason
from loaderd.v1.generation_pb2 import FinishReason, StreamGenerateRequest, TokenIds
from tests.unit.worker.batching.beams import outputs_by_index, reference_beams
from tests.unit.worker.engine_client import (
    EOS,
    PROMPT,
    SIZES,
    TIMEOUT,
    Client,
    Gate,
    build,
    reference,
)


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


def logits_before(model: Any, token_ids: list[int]) -> torch.Tensor:
    """What the model puts out for each of these tokens after the prompt."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([[*PROMPT, *token_ids]])).logits[0]
    return logits[len(PROMPT) - 1 : -1]


def test_greedy_output_is_that_of_transformers(client: Client) -> None:
    expected = reference(client.model, do_sample=False, max_new_tokens=40)
    outputs = client.generate(do_sample=False, max_new_tokens=40, return_token_ids=True)
    assert outputs.token_ids == expected
    assert len(set(expected)) > 3, "a model that says one thing only proves nothing"


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 3.0},
        {"temperature": 1.3, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.98},
        {"top_p": 0.9, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"temperature": 9.0, "allowed_token_ids": TokenIds(ids=range(30)), "logit_bias": {7: -9}},
        {"temperature": 2.0, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ],
)
def test_seeded_samples_are_those_of_the_batching_engine(
    llama: Client, options: dict[str, Any]
) -> None:
    batching = Client(build("llama"), "batching")
    expected = batching.token_ids(seed=7, max_new_tokens=30, **options)
    batching.engine.close()
    assert llama.token_ids(seed=7, max_new_tokens=30, **options) == expected


def test_masks_hold_for_every_model(client: Client) -> None:
    outputs = client.generate(
        temperature=5.0,
        allowed_token_ids=TokenIds(ids=range(40, 50)),
        no_repeat_ngram_size=1,
        max_new_tokens=8,
        return_token_ids=True,
    )
    assert len(set(outputs.token_ids)) == 8
    assert set(outputs.token_ids) <= set(range(40, 50))


def test_masks_that_leave_no_token_fail_the_request(llama: Client) -> None:
    outputs = llama.generate(
        allowed_token_ids=TokenIds(ids=[7, 8]), no_repeat_ngram_size=1, max_new_tokens=8
    )
    assert outputs.error is not None
    assert outputs.error.reason == ErrorReason.ERROR_REASON_INVALID_ARGUMENT
    assert outputs.error.metadata["field"] == "allowed_token_ids"
    assert llama.token_ids(do_sample=False, max_new_tokens=3)


def test_log_probabilities_are_those_of_the_model(client: Client) -> None:
    outputs = client.generate(top_logprobs=2, temperature=3.0, repetition_penalty=2.0, seed=1,
                              max_new_tokens=6, return_token_ids=True)  # fmt: skip
    told = [logprob for delta in outputs.deltas for logprob in delta.logprobs]
    expected = logits_before(client.model, outputs.token_ids).log_softmax(-1)
    assert [token.token_id for token in told] == outputs.token_ids
    own = expected.gather(1, torch.tensor(outputs.token_ids)[:, None])[:, 0]
    assert [token.logprob for token in told] == pytest.approx(own.tolist(), abs=1e-4)
    best = expected.topk(2).values
    assert [[top.logprob for top in token.top] for token in told] == [
        pytest.approx(row, abs=1e-4) for row in best.tolist()
    ]


def test_penalties_are_those_of_transformers(llama: Client) -> None:
    options: dict[str, Any] = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
    expected = reference(llama.model, do_sample=False, max_new_tokens=30, **options)
    assert llama.token_ids(do_sample=False, max_new_tokens=30, **options) == expected
    assert expected != reference(llama.model, do_sample=False, max_new_tokens=30)


def test_unset_options_are_the_models_own() -> None:
    model = build("llama")
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_p=0.8,
        top_k=9,
        repetition_penalty=1.2,
        eos_token_id=EOS,
    )
    own, plain = Client(model), Client(build("llama"))
    given: dict[str, Any] = {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 9,
        "repetition_penalty": 1.2,
    }
    expected = plain.token_ids(seed=3, max_new_tokens=30, **given)
    assert own.token_ids(seed=3, max_new_tokens=30) == expected
    for client in (own, plain):
        client.engine.close()


@pytest.mark.parametrize(
    "own",
    [
        {"suppress_tokens": [5, 20, 24]},
        {"sequence_bias": [[[24], -100.0]]},
        {"bad_words_ids": [[24], [5]]},
        {"guidance_scale": 3.0},
        {"forced_eos_token_id": 1},
        {"exponential_decay_length_penalty": (1, 2.0)},
        {"encoder_repetition_penalty": 1.5},
        {"begin_suppress_tokens": [24]},
        {"max_length": 8},
        {"num_beams": 3, "num_return_sequences": 2},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
    ids=lambda own: next(iter(own)),
)
def test_what_is_no_parameter_of_a_request_does_not_act(llama: Client, own: dict[str, Any]) -> None:
    model = build("llama")
    model.generation_config.update(**own)
    client = Client(model)
    for options in ({}, {"num_beams": 3}):
        asked: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12} | options
        assert client.token_ids(**asked) == llama.token_ids(**asked)
    client.engine.close()


def test_without_own_options_nothing_is_cut_off(llama: Client) -> None:
    """transformers' own default would be the 50 most probable of these 97 tokens."""
    token_ids = llama.token_ids(seed=5, temperature=100.0, max_new_tokens=40, ignore_eos=True)
    logits = logits_before(llama.model, token_ids)
    chosen = logits.gather(1, torch.tensor(token_ids)[:, None])
    assert (logits > chosen).sum(-1).max() >= 50


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


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 4, "n": 3, "length_penalty": 0.0, "early_stopping": True},
        {"num_beams": 3, "n": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
)
def test_beams_are_those_of_transformers(client: Client, options: dict[str, Any]) -> None:
    free = reference_beams(client.model, PROMPT, max_new_tokens=12, eos_token_id=None, num_beams=3)
    asked: dict[str, Any] = {"max_new_tokens": 12, **options}
    for stops in ([], free[0][5:7]):
        expected = reference_beams(client.model, PROMPT, eos_token_id=[EOS, *stops], **asked)
        outputs = client.generate(stop_token_ids=stops, return_token_ids=True, **asked)
        assert outputs_by_index(outputs) == expected


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        ("rwkv", {"attention_hidden_size": 32, "intermediate_size": 64, "context_length": 128}),
        (
            "recurrent_gemma",
            {
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "intermediate_size": 64,
                "attention_window_size": 16,
                "lru_width": 32,
            },
        ),
    ],
)
def test_beams_of_a_model_whose_state_cannot_follow_them(
    architecture: str, sizes: dict[str, Any]
) -> None:
    client = Client(build(architecture, **sizes))
    options: dict[str, Any] = {"num_beams": 4, "n": 3, "max_new_tokens": 12}
    outputs = client.generate(return_token_ids=True, ignore_eos=True, **options)
    client.engine.close()
    assert outputs_by_index(outputs) == reference_beams(
        client.model, PROMPT, use_cache=False, eos_token_id=None, **options
    )


def test_candidates_that_time_leaves_out_are_not_computed(llama: Client) -> None:
    request = StreamGenerateRequest()
    request.max_time.FromNanoseconds(1)
    options: dict[str, Any] = {"max_time": request.max_time, "return_token_ids": True}
    outputs = llama.generate(n=3, temperature=1.0, max_new_tokens=9, **options)
    assert outputs.finished is not None
    reasons = [finish.reason for finish in outputs.finished.finishes]
    assert reasons == [FinishReason.FINISH_REASON_TIME] * 3
    assert [len(tokens) for tokens in outputs_by_index(outputs)] == [1, 0, 0]
    ranked = llama.generate(n=1, best_of=3, temperature=1.0, max_new_tokens=9, **options)
    assert len(ranked.token_ids) == 1


def test_the_queue_goes_by_priority(llama: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loaderd.server.worker.engine.reception._TELL_SECONDS", 0.0)
    gate = Gate(llama.model, monkeypatch)
    llama.start(max_new_tokens=3, ignore_eos=True)
    assert gate.entered.wait(TIMEOUT)
    last = llama.start(max_new_tokens=3, ignore_eos=True)
    next_one = llama.start(max_new_tokens=3, ignore_eos=True, priority=1)
    gate.open.set()
    assert llama.wait(last).positions == [1, 0]
    assert llama.wait(next_one).positions == [0]


def test_a_full_queue_refuses(llama: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(llama.model, monkeypatch)
    keys = [llama.start(max_new_tokens=1)]
    assert gate.entered.wait(TIMEOUT)
    keys += [llama.start(max_new_tokens=1) for _ in range(1024)]
    with pytest.raises(QueueFullError):
        llama.start(max_new_tokens=1)
    for key in keys:
        llama.engine.cancel(key)
    gate.open.set()
    assert all(llama.wait(key).finished is not None for key in keys)


def test_what_concerns_a_prefix_cache_changes_nothing(llama: Client) -> None:
    plain = llama.token_ids(do_sample=False, max_new_tokens=5)
    options: dict[str, Any] = {"cache_salt": "salt", "bypass_prefix_cache": True}
    outputs = llama.generate(do_sample=False, max_new_tokens=5, return_token_ids=True, **options)
    assert outputs.finished is not None
    assert outputs.finished.usage.cached_prompt_tokens == 0
    assert outputs.token_ids == plain


def test_generate_says_nothing(llama: Client, recwarn: pytest.WarningsRecorder) -> None:
    llama.generate(max_new_tokens=3, temperature=0.5, top_k=3)
    llama.generate(max_new_tokens=3, do_sample=False, ignore_eos=True)
    llama.generate(max_new_tokens=3, num_beams=2, length_penalty=2.0)
    assert [str(warning.message) for warning in recwarn] == []
