from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from loaderd.server.errors import InvalidArgumentError, UnsupportedOptionError
from loaderd.server.worker.engine.parameters import (
    ModelFacts,
    SamplingDefaults,
    check_supported,
    typed_request,
)
from loaderd.server.worker.engine.protocol import Beams, GenerationRequest
from loaderd.server.worker.engine.sequential import SequentialEngine
from loaderd.v1.generation_pb2 import StreamGenerateRequest, TokenIds

FACTS = ModelFacts(
    context_length=1000, vocabulary_size=500, eos_token_ids=(2, 7), defaults=SamplingDefaults()
)
OWN_SAMPLING = SamplingDefaults(do_sample=True, temperature=0.6, top_k=20, top_p=0.9)
SUPPORTED = SequentialEngine.supported_parameters

ACCEPTED_AT_DEFAULT: dict[str, Any] = {
    "priority": 0,
    "n": 1,
    "best_of": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logprobs": False,
    "top_logprobs": 0,
    "num_beams": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
    "bypass_prefix_cache": False,
}


def typed(
    facts: ModelFacts = FACTS, prompt: list[int] | None = None, **fields: Any
) -> GenerationRequest:
    request = StreamGenerateRequest(model="m", text="x", **fields)
    return typed_request(
        request, key=1, prompt=[5, 6] if prompt is None else prompt, arrived=0.0, facts=facts
    )


def refused_field(facts: ModelFacts = FACTS, prompt: list[int] | None = None, **fields: Any) -> str:
    with pytest.raises(InvalidArgumentError) as caught:
        typed(facts, prompt, **fields)
    return caught.value.field


def test_every_field_of_the_protocol_is_honoured() -> None:
    names = {field.name for field in StreamGenerateRequest.DESCRIPTOR.fields}
    assert names == SUPPORTED | {"model", "request_id"}


@pytest.mark.parametrize("field", ["seed", "n"])
def test_what_an_engine_cannot_honour_is_refused_by_name(field: str) -> None:
    request = StreamGenerateRequest(model="m", text="x", temperature=1.0, **{field: 2})  # type: ignore[arg-type]
    with pytest.raises(UnsupportedOptionError) as caught:
        check_supported(request, "plain", SUPPORTED - {field})
    assert caught.value.field == field
    assert "plain engine" in caught.value.problem


@pytest.mark.parametrize("field", ACCEPTED_AT_DEFAULT)
def test_a_default_that_is_given_asks_for_nothing(field: str) -> None:
    request = StreamGenerateRequest(model="m", **{field: ACCEPTED_AT_DEFAULT[field]})
    assert request.HasField(field)  # type: ignore[arg-type] # the names are literals there
    check_supported(request, "sequential", SUPPORTED)


def test_a_field_of_a_newer_protocol_is_refused() -> None:
    request = StreamGenerateRequest.FromString(bytes([0xA0, 0x3E, 0x01]))  # field 996
    with pytest.raises(UnsupportedOptionError, match="field 996"):
        check_supported(request, "sequential", SUPPORTED)


def test_defaults() -> None:
    request = typed()
    assert request.prompt == (5, 6)
    sampling, stopping = request.sampling, request.stopping
    assert not sampling.do_sample
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, 0, 1.0)
    assert (sampling.min_p, sampling.typical_p, sampling.repetition_penalty) == (0.0, 1.0, 1.0)
    assert (stopping.max_new_tokens, stopping.min_new_tokens) == (256, 0)
    assert stopping.eos_token_ids == (2, 7)
    assert stopping.max_seconds is None
    assert request.skip_special_tokens
    assert not request.echo
    assert not request.return_token_ids


def test_the_client_is_who_the_daemon_says() -> None:
    assert typed().client == ""
    request = StreamGenerateRequest(model="m", text="x")
    made = typed_request(request, key=1, prompt=[5], arrived=0.0, facts=FACTS, client="ipv4:a:1")
    assert made.client == "ipv4:a:1"


def test_unset_sampling_options_are_the_models_own() -> None:
    facts = replace(FACTS, defaults=OWN_SAMPLING)
    sampling = typed(facts, top_p=0.5).sampling
    assert (sampling.do_sample, sampling.temperature, sampling.top_k) == (True, 0.6, 20)
    assert sampling.top_p == 0.5


@pytest.mark.parametrize(
    ("fields", "own", "sampled"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"temperature": 0.5}, False, True),
        ({"temperature": 0.0}, True, False),
        ({"temperature": 0.0, "top_p": 0.9}, True, False),
        ({"top_k": 0}, False, True),
        ({"top_p": 1.0}, False, True),
        ({"min_p": 0.0}, False, True),
        ({"typical_p": 0.5}, False, True),
        ({"seed": 3}, False, False),
        ({"repetition_penalty": 1.5}, False, False),
        ({"do_sample": True}, False, True),
        ({"do_sample": False}, True, False),
        ({"do_sample": False, "temperature": 0.0}, True, False),
    ],
)
def test_when_it_samples(fields: dict[str, Any], own: bool, sampled: bool) -> None:
    facts = replace(FACTS, defaults=replace(OWN_SAMPLING, do_sample=own))
    assert typed(facts, **fields).sampling.do_sample is sampled


@pytest.mark.parametrize("field", ["temperature", "top_k", "top_p", "min_p", "typical_p"])
def test_sampling_options_contradict_do_sample_false(field: str) -> None:
    option: dict[str, Any] = {field: 1}
    assert refused_field(do_sample=False, **option) == "do_sample"


def test_what_would_make_logits_infinite_is_out_of_bounds() -> None:
    assert refused_field(temperature=1e-39) == "temperature"
    assert refused_field(repetition_penalty=1e-39) == "repetition_penalty"


def test_temperature_zero_contradicts_do_sample_true() -> None:
    assert refused_field(do_sample=True, temperature=0.0) == "temperature"


def test_a_model_whose_own_temperature_is_zero_is_greedy() -> None:
    facts = replace(FACTS, defaults=replace(OWN_SAMPLING, temperature=0.0))
    assert not typed(facts).sampling.do_sample
    assert typed(facts, temperature=0.3).sampling.do_sample


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, 100.1, NAN, INF]),
        ("top_p", [0.0, -1.0, 1.1, NAN, INF]),
        ("min_p", [-0.1, 1.1, NAN, INF]),
        ("typical_p", [0.0, 1.1, NAN, INF]),
        ("repetition_penalty", [0.0, -1.0, 100.1, NAN, INF]),
        ("max_new_tokens", [0, 999, 2**32 - 1]),
        ("truncate_prompt_tokens", [0]),
        ("stop_token_ids", [[500]]),
        ("max_time", [Duration(), Duration(seconds=-1), Duration(nanos=-1)]),
    ],
)
def test_values_out_of_bounds_are_refused_by_name(field: str, values: list[Any]) -> None:
    for value in values:
        assert refused_field(**{field: value}) == field


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 100.0},
        {"top_p": 1.0},
        {"top_p": 1e-9},
        {"min_p": 1.0},
        {"min_p": 0.0},
        {"typical_p": 1.0},
        {"repetition_penalty": 100.0},
        {"max_new_tokens": 998},
        {"max_new_tokens": 1, "min_new_tokens": 1},
        {"stop": ["x" * 256] * 16},
        {"stop_token_ids": [499] * 64},
        {"max_time": Duration(nanos=1)},
        {"request_id": "x" * 128},
        {"truncate_prompt_tokens": 1},
    ],
)
def test_bounds_belong_to_the_range(fields: dict[str, Any]) -> None:
    typed(**fields)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("n", [0, 33]),
        ("best_of", [0, 33]),
        ("presence_penalty", [-2.1, 2.1, NAN]),
        ("frequency_penalty", [-2.1, 2.1, NAN]),
        ("logit_bias", [{5: 100.1}, {5: -100.1}, {5: NAN}, {2000: 1.0}]),
        ("allowed_token_ids", [TokenIds(), TokenIds(ids=[5, 2000])]),
        ("top_logprobs", [21]),
        ("prompt_logprobs", [21]),
        ("num_beams", [0, 33]),
    ],
)
def test_further_options_have_bounds_too(field: str, values: list[Any]) -> None:
    for value in values:
        assert refused_field(replace(FACTS, vocabulary_size=2000), **{field: value}) == field


def test_further_options_are_as_asked_for() -> None:
    request = typed(
        n=2,
        best_of=32,
        presence_penalty=2,
        frequency_penalty=-2,
        logit_bias={499: -100.0, 3: 100.0},
        allowed_token_ids=TokenIds(ids=[7, 3, 7]),
        cache_salt="x" * 256,
        priority=-3,
        bypass_prefix_cache=True,
    )
    assert (request.n, request.best_of, request.priority) == (2, 32, -3)
    assert (request.cache_salt, request.bypass_prefix_cache) == ("x" * 256, True)
    sampling = request.sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (2, -2)
    assert sampling.logit_bias == ((3, 100.0), (499, -100.0))
    assert sampling.allowed_token_ids == (3, 7)


def test_options_that_were_not_asked_for_ask_for_nothing() -> None:
    request = typed()
    assert (request.n, request.best_of, request.priority, request.cache_salt) == (1, 1, 0, "")
    assert (request.top_logprobs, request.prompt_logprobs) == (None, None)
    assert not request.bypass_prefix_cache
    sampling = request.sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0, 0)
    assert (sampling.logit_bias, sampling.allowed_token_ids, sampling.bad_words) == ((), (), ())


def test_best_of_is_n_and_never_below() -> None:
    assert typed(n=3).best_of == 3
    assert refused_field(n=3, best_of=2) == "best_of"


def test_beams_are_as_asked_for() -> None:
    plain = typed(num_beams=2)
    assert plain.beams == Beams(2, 1.0, early_stopping=False)
    assert (plain.n, plain.best_of, plain.sequences) == (1, 1, 2)
    most = typed(num_beams=32, n=32, best_of=32, length_penalty=-2, early_stopping=True)
    assert most.beams == Beams(32, -2.0, early_stopping=True)
    assert typed(num_beams=2, length_penalty=2).beams == Beams(2, 2.0, early_stopping=False)


def test_one_beam_is_none() -> None:
    request = typed(num_beams=1, length_penalty=1, early_stopping=False, n=3)
    assert (request.beams, request.sequences) == (None, 3)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("length_penalty", [-2.1, 2.1, NAN, INF]),
        ("n", [3]),
        ("best_of", [2]),
        ("stop", [["x"]]),
        ("logprobs", [True]),
        ("top_logprobs", [1]),
        ("do_sample", [True]),
        ("temperature", [0.5]),
        ("top_k", [0, 5]),
        ("top_p", [1.0]),
        ("min_p", [0.0]),
        ("typical_p", [1.0]),
    ],
)
def test_what_does_not_go_with_beams_is_refused_by_name(field: str, values: list[Any]) -> None:
    for value in values:
        assert refused_field(num_beams=2, **{field: value}) == field


def test_best_of_is_refused_by_its_own_name_with_beams() -> None:
    assert refused_field(num_beams=4, n=2, best_of=4) == "best_of"


@pytest.mark.parametrize(
    "fields",
    [
        {"do_sample": False},
        {"temperature": 0.0},
        {"temperature": 0.0, "top_p": 0.9},
        {"seed": 3},
        {"logprobs": False, "top_logprobs": 0},
        {"prompt_logprobs": 2},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
    ],
)
def test_beams_do_not_sample_whatever_the_models_own_default(fields: dict[str, Any]) -> None:
    facts = replace(FACTS, defaults=OWN_SAMPLING)
    assert not typed(facts, num_beams=2, **fields).sampling.do_sample


@pytest.mark.parametrize("fields", [{"length_penalty": 2.0}, {"early_stopping": True}])
@pytest.mark.parametrize("one", [{}, {"num_beams": 1}])
def test_options_of_beams_need_beams(fields: dict[str, Any], one: dict[str, Any]) -> None:
    assert [refused_field(**fields, **one)] == list(fields)


@pytest.mark.parametrize(
    ("fields", "top"),
    [
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
        ({"top_logprobs": 3}, 3),
        ({"top_logprobs": 0}, None),
        ({"logprobs": False}, None),
        ({"logprobs": False, "top_logprobs": 0}, None),
    ],
)
def test_when_log_probabilities_are_told(fields: dict[str, Any], top: int | None) -> None:
    assert typed(**fields).top_logprobs == top


def test_top_logprobs_contradicts_logprobs_false() -> None:
    assert refused_field(logprobs=False, top_logprobs=1) == "top_logprobs"


def test_prompt_logprobs_need_the_whole_prompt_computed() -> None:
    request = typed(prompt_logprobs=0)
    assert (request.prompt_logprobs, request.bypass_prefix_cache) == (0, True)


def test_bad_words_are_those_of_the_tokenizer() -> None:
    request = StreamGenerateRequest(model="m", text="x", bad_words=["word"])

    def words(*token_ids: list[int]) -> tuple[tuple[int, ...], ...]:
        made = typed_request(
            request, key=1, prompt=[5], arrived=0.0, facts=FACTS, bad_words=token_ids
        )
        return made.sampling.bad_words

    assert words([3], [4, 3]) == ((3,), (4, 3))
    with pytest.raises(InvalidArgumentError, match="bad_words"):
        words()


def test_min_new_tokens_is_at_most_max_new_tokens_also_when_that_is_the_default() -> None:
    assert refused_field(max_new_tokens=3, min_new_tokens=4) == "min_new_tokens"
    assert refused_field(min_new_tokens=257) == "min_new_tokens"
    assert typed(min_new_tokens=256).stopping.min_new_tokens == 256


def test_the_default_length_is_what_the_context_leaves() -> None:
    assert typed(prompt=[5] * 990).stopping.max_new_tokens == 10


def test_a_prompt_that_fills_the_context_is_refused_with_both_lengths() -> None:
    for length in (1000, 1001):
        with pytest.raises(InvalidArgumentError) as caught:
            typed(prompt=[5] * length)
        assert caught.value.field == "text"
        assert f"{length} tokens" in caught.value.problem
        assert "1000" in caught.value.problem


def test_a_prompt_can_be_cut_to_fit() -> None:
    prompt = [5] * 1500 + [6, 7]
    request = typed(prompt=prompt, truncate_prompt_tokens=10)
    assert request.prompt == (*[5] * 8, 6, 7)
    assert request.stopping.max_new_tokens == 256


def test_a_model_without_a_fixed_context_takes_any_length() -> None:
    facts = replace(FACTS, context_length=0)
    request = typed(facts, prompt=[5] * 5000, max_new_tokens=10**9)
    assert len(request.prompt) == 5000
    assert request.stopping.max_new_tokens == 10**9


def test_an_empty_prompt_is_refused() -> None:
    assert refused_field(prompt=[]) == "text"


def test_token_ids_beyond_the_vocabulary_are_refused() -> None:
    assert refused_field(prompt=[5, 500]) == "text"
    typed(prompt=[499])


def test_ignore_eos_leaves_the_other_stops() -> None:
    stopping = typed(ignore_eos=True, stop_token_ids=[9], stop=["x"]).stopping
    assert stopping.eos_token_ids == ()
    assert (stopping.stop_token_ids, stopping.stop_strings) == ((9,), ("x",))


@given(seed=st.integers(0, 2**64 - 1))
def test_a_seed_is_kept(seed: int) -> None:
    assert typed(seed=seed).sampling.seed == seed


def test_seeds_are_drawn_anew() -> None:
    seeds = {typed().sampling.seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**64 for seed in seeds)
