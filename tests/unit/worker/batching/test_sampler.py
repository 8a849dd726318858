from collections.abc import Hashable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from loaderd.server.errors import InternalError, InvalidArgumentError
from loaderd.server.worker.engine.batching.sampler import BatchSampler, prompt_logprobs
from loaderd.server.worker.engine.protocol import GenerationRequest, SampledToken
from tests.unit.worker.batching.sampling import EOS, VOCABULARY, asked, random_logits

STEPS = 12

token_ids = st.integers(0, VOCABULARY - 1)
masks = st.fixed_dictionaries(
    {"prompt": st.lists(st.integers(0, 7), min_size=1, max_size=12)},
    optional={
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3, 5.0]),
        "no_repeat_ngram_size": st.integers(0, 4),
        "logit_bias": st.dictionaries(
            st.integers(0, 11), st.sampled_from([-100.0, -1.0, 3.0]), max_size=4
        ),
        "bad_words": st.lists(st.lists(token_ids, min_size=1, max_size=3), min_size=1, max_size=4),
        "min_new_tokens": st.integers(0, STEPS),
    },
)


class Run:
    """A batch in which every step has random logits."""

    def __init__(self, requests: dict[Hashable, GenerationRequest], seed: int = 0) -> None:
        self.sampler = BatchSampler()
        self.tokens: dict[Hashable, list[SampledToken]] = {key: [] for key in requests}
        self._seeds = {key: seed + place * 1000 for place, key in enumerate(requests)}
        for key, request in requests.items():
            self.sampler.admit(key, request)

    def logits(self, key: Hashable, step: int) -> Tensor:
        """What a row's model puts out."""
        logits = random_logits(self._seeds[key] + step, VOCABULARY)
        logits[EOS] += 3  # so that an end is often the best
        logits[:8] += 2  # so that tokens come again
        return logits

    def step(self, keys: Sequence[Hashable]) -> Tensor:
        """Samples; gives the logits as masks and penalties left them."""
        places = [len(self.tokens[key]) for key in keys]
        logits = torch.stack(
            [self.logits(key, place) for key, place in zip(keys, places, strict=True)]
        )
        for key, token in zip(keys, self.sampler.sample(logits, keys), strict=True):
            assert isinstance(token, SampledToken)
            self.tokens[key].append(token)
        return logits

    def ids(self, key: Hashable) -> list[int]:
        return [token.token_id for token in self.tokens[key]]


def generate(request: GenerationRequest, seed: int = 0, steps: int = STEPS) -> list[int]:
    run = Run({0: request}, seed)
    for _ in range(steps):
        run.step([0])
    return run.ids(0)


def reference(request: GenerationRequest) -> LogitsProcessorList:
    """What transformers' generate makes of the request, in its order."""
    sampling, stopping = request.sampling, request.stopping
    processors = LogitsProcessorList()
    if sampling.logit_bias:
        bias = {(token_id,): added for token_id, added in sampling.logit_bias}
        processors.append(SequenceBiasLogitsProcessor(bias))
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size))
    words = [list(word) for word in sampling.bad_words if word != (EOS,)]
    if words:
        processors.append(NoBadWordsLogitsProcessor(words, EOS))
    processors.append(
        MinNewTokensLengthLogitsProcessor(len(request.prompt), stopping.min_new_tokens, EOS)
    )
    return processors


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), fields=masks)
def test_masks_and_penalties_are_those_of_transformers(seed: int, fields: dict[str, Any]) -> None:
    request = asked(max_new_tokens=STEPS, **fields)
    run, processors = Run({0: request}, seed), reference(request)
    for step in range(STEPS):
        text = torch.tensor([[*request.prompt, *run.ids(0)]])
        scores = processors(text, run.logits(0, step)[None])
        logits = run.step([0])
        torch.testing.assert_close(logits, scores)
        assert run.ids(0)[-1] == scores.argmax()


@settings(max_examples=30)
@given(
    fields=st.lists(
        st.tuples(masks, st.sampled_from([{}, {"temperature": 0.9}, {"top_k": 5}, {"top_p": 0.8}])),
        min_size=2,
        max_size=5,
    ),
    turns=st.lists(st.sets(st.integers(0, 4), min_size=1), min_size=1, max_size=10),
)
def test_a_request_gets_the_same_tokens_in_every_company(
    fields: list[tuple[dict[str, Any], dict[str, Any]]], turns: list[set[int]]
) -> None:
    requests: dict[Hashable, GenerationRequest] = {
        place: asked(max_new_tokens=STEPS, seed=7, **mask, **limits)
        for place, (mask, limits) in enumerate(fields)
    }
    run = Run(requests)
    for turn in turns:
        if keys := [key for key in requests if key in turn]:
            run.step(keys)
    for place, (key, request) in enumerate(requests.items()):
        assert run.ids(key) == generate(request, place * 1000, len(run.ids(key)))


def test_the_same_seed_gives_the_same_tokens_and_another_one_others() -> None:
    first = generate(asked(temperature=5.0, seed=1))
    assert first == generate(asked(temperature=5.0, seed=1))
    assert first != generate(asked(temperature=5.0, seed=2))


def penalized(prompt: list[int], output: list[int], **fields: Any) -> list[float]:
    """What becomes of logits that are all 0, after this output."""
    sampler = BatchSampler()
    sampler.admit(0, asked(prompt, **fields))
    for token_id in output:
        forced = torch.full((1, 10), -50.0)
        forced[0, token_id] = 50.0
        sampler.sample(forced, [0])
    logits = torch.zeros(1, 10)
    sampler.sample(logits, [0])
    changed: list[float] = logits[0].tolist()
    return changed


def test_presence_and_frequency_count_the_output_only() -> None:
    prompt, output = [1, 1, 2], [3, 4, 3, 3]
    assert penalized(prompt, output, presence_penalty=0.5) == [0, 0, 0, -0.5, -0.5, *[0] * 5]
    assert penalized(prompt, output, frequency_penalty=0.5) == [0, 0, 0, -1.5, -0.5, *[0] * 5]
    both = penalized(prompt, output, presence_penalty=-0.25, frequency_penalty=0.5)
    assert both == [0, 0, 0, -1.25, -0.25, *[0] * 5]


def test_many_different_tokens_are_counted() -> None:
    request = asked([0], no_repeat_ngram_size=0, repetition_penalty=2.0, frequency_penalty=2.0)
    sampler = BatchSampler()
    sampler.admit(0, request)
    for token_id in range(500):
        forced = torch.full((1, 501), -(10.0**6))
        forced[0, token_id] = 10.0**6
        sampler.sample(forced, [0])
    logits = torch.ones(1, 501)
    sampler.sample(logits, [0])
    assert logits[0].tolist() == [-1.5] * 500 + [1.0]


def test_only_allowed_tokens_come() -> None:
    allowed = [3, 9, 17]
    options: list[dict[str, Any]] = [{}, {"temperature": 9.0}, {"top_p": 0.9}]
    for fields in options:
        tokens = generate(asked(allowed=allowed, logit_bias={5: 100.0}, **fields), steps=40)
        assert set(tokens) <= set(allowed)
        assert len(set(tokens)) > 1


def test_a_neighbours_masks_do_not_reach_a_row() -> None:
    plain, masked = asked(), asked([1, 5], allowed=[4], bad_words=[[9]], logit_bias={3: 100.0})
    run = Run({"plain": plain, "masked": masked})
    run.step(["masked", "plain"])
    assert run.ids("plain") == [int(run.logits("plain", 0).argmax())]
    assert run.ids("masked") == [4]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"allowed": [EOS], "min_new_tokens": 3}, "allowed_token_ids"),
        ({"bad_words": [[it] for it in range(VOCABULARY)], "ignore_eos": True}, "bad_words"),
        ({"no_repeat_ngram_size": 1, "prompt": list(range(VOCABULARY))}, "no_repeat_ngram_size"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_masks_that_leave_no_token_fail_their_request_only(
    fields: dict[str, Any], field: str, temperature: float
) -> None:
    sampler = BatchSampler()
    sampler.admit("masked", asked(temperature=temperature, **fields))
    sampler.admit("plain", asked())
    logits = random_logits(3, 2, VOCABULARY)
    error, token = sampler.sample(logits.clone(), ["masked", "plain"])
    assert isinstance(error, InvalidArgumentError)
    assert error.field == field
    assert token == SampledToken(int(logits[1].argmax()))


def test_logits_that_are_no_numbers_are_an_incident() -> None:
    sampler = BatchSampler()
    sampler.admit(0, asked(repetition_penalty=2.0))
    sampler.admit(1, asked(top_p=0.5))
    for error in sampler.sample(torch.full((2, VOCABULARY), torch.nan), [0, 1]):
        assert isinstance(error, InternalError)


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.2}, {"top_k": 1}])
def test_log_probabilities_are_those_of_the_model(fields: dict[str, Any]) -> None:
    sampler = BatchSampler()
    fields_told = {"logit_bias": {3: 100.0}, "repetition_penalty": 2.0, **fields}
    sampler.admit("told", asked(top_logprobs=4, **fields_told))
    sampler.admit("none", asked(**fields))
    sampler.admit("own", asked(logprobs=True, **fields))
    logits = random_logits(9, 3, VOCABULARY)
    told, none, own = sampler.sample(logits.clone(), ["told", "none", "own"])
    assert isinstance(told, SampledToken)
    assert isinstance(none, SampledToken)
    assert isinstance(own, SampledToken)
    expected = logits.log_softmax(-1)
    assert told.token_id == 3
    assert told.logprob == pytest.approx(expected[0, 3].item())
    best = expected[0].topk(4)
    assert [token_id for token_id, _ in told.top] == best.indices.tolist()
    assert [logprob for _, logprob in told.top] == pytest.approx(best.values.tolist())
    assert (none.logprob, none.top, own.top) == (None, (), ())
    assert own.logprob == pytest.approx(expected[2, own.token_id].item())


def test_log_probabilities_of_a_prompt() -> None:
    logits = random_logits(4, 3, VOCABULARY)
    expected = logits.log_softmax(-1)
    told = prompt_logprobs(logits, [5, 6, 7], top=2)
    assert [token.token_id for token in told] == [5, 6, 7]
    assert [token.logprob for token in told] == pytest.approx(
        [expected[place, place + 5].item() for place in range(3)]
    )
    assert [token.top[0][0] for token in told] == logits.argmax(-1).tolist()
    assert {len(token.top) for token in told} == {2}


def test_it_takes_what_a_model_puts_out_in_inference_mode() -> None:
    sampler = BatchSampler()
    sampler.admit(0, asked(temperature=0.5, top_p=0.5, logit_bias={3: 100.0}, logprobs=True))
    with torch.inference_mode():
        logits = random_logits(0, 1, VOCABULARY) * 2
    (token,) = sampler.sample(logits, [0])
    assert isinstance(token, SampledToken)
    assert token.token_id == 3


def test_a_retired_completion_is_forgotten() -> None:
    sampler = BatchSampler()
    sampler.admit(0, asked())
    sampler.retire(0)
    sampler.retire(0)
    with pytest.raises(KeyError):
        sampler.sample(random_logits(0, 1, VOCABULARY), [0])
