"""Several completions of a prompt, beams, and how probable tokens are."""

from __future__ import annotations

from statistics import mean
from typing import Any

import pytest

from loaderd.client import AsyncModel, Completion, TokenLogprob, errors

PROMPT = "The quick brown fox"
GREEDY: dict[str, Any] = {"temperature": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 7, "max_new_tokens": 8}


def require(model: AsyncModel, *parameters: str) -> None:
    """Skips the test where the model's engine does not honour a parameter."""
    assert model.details is not None
    if missing := set(parameters) - set(model.details.supported_parameters):
        pytest.skip(f"the {model.details.engine} engine does not support {', '.join(missing)}")


def check_alternatives(told: tuple[TokenLogprob, ...], top: int) -> None:
    for token in told:
        assert token.logprob <= 0
        assert len(token.top) == top
        logprobs = [other.logprob for other in token.top]
        assert logprobs == sorted(logprobs, reverse=True)
        assert {other.text for other in token.top if other.token_id == token.token_id} <= {
            token.text
        }


async def test_each_token_comes_with_its_log_probability(model: AsyncModel) -> None:
    require(model, "logprobs", "top_logprobs")
    asked: dict[str, Any] = {"max_new_tokens": 8, "return_token_ids": True, **GREEDY}

    result = await model.generate(PROMPT, top_logprobs=3, **asked)

    assert [told.token_id for told in result.logprobs] == list(result.token_ids)
    check_alternatives(result.logprobs, top=3)
    for told in result.logprobs:  # greedy: the best one
        assert (told.top[0].token_id, told.top[0].logprob) == (told.token_id, told.logprob)
    own = await model.generate(PROMPT, logprobs=True, **asked)
    assert [told.token_id for told in own.logprobs] == list(own.token_ids)
    check_alternatives(own.logprobs, top=0)
    assert (await model.generate(PROMPT, **asked)).logprobs == ()


async def test_a_stream_has_the_log_probabilities_of_its_tokens(model: AsyncModel) -> None:
    require(model, "logprobs", "top_logprobs")
    asked: dict[str, Any] = {"max_new_tokens": 8, "top_logprobs": 2, **GREEDY}
    whole = await model.generate(PROMPT, return_token_ids=True, **asked)

    stream = model.stream(PROMPT, return_token_ids=True, **asked)
    deltas = [delta async for delta in stream]

    for delta in deltas:
        assert [told.token_id for told in delta.logprobs] == list(delta.token_ids)
    told = [told for delta in deltas for told in delta.logprobs]
    assert stream.result.logprobs == tuple(told)
    assert [token.token_id for token in told] == list(whole.token_ids)


async def test_log_probabilities_of_the_prompt(model: AsyncModel) -> None:
    require(model, "prompt_logprobs")
    token_ids = (await model.tokenize(PROMPT)).token_ids

    result = await model.generate(PROMPT, max_new_tokens=2, prompt_logprobs=2, **GREEDY)
    stream = model.stream(PROMPT, max_new_tokens=2, prompt_logprobs=0, **GREEDY)
    async for _ in stream:
        pass

    assert [told.token_id for told in result.prompt_logprobs] == list(token_ids[1:])
    check_alternatives(result.prompt_logprobs, top=2)
    assert [told.token_id for told in stream.result.prompt_logprobs] == list(token_ids[1:])
    check_alternatives(stream.result.prompt_logprobs, top=0)
    assert result.logprobs == ()
    assert (await model.generate(PROMPT, max_new_tokens=1)).prompt_logprobs == ()


async def test_top_logprobs_without_logprobs_is_refused(model: AsyncModel) -> None:
    require(model, "logprobs", "top_logprobs")
    with pytest.raises(errors.InvalidArgumentError) as caught:
        await model.generate(PROMPT, logprobs=False, top_logprobs=1)
    assert caught.value.field == "top_logprobs"


async def test_several_completions(model: AsyncModel) -> None:
    require(model, "n")

    result = await model.generate(PROMPT, n=3, return_token_ids=True, **SAMPLED)
    stream = model.stream(PROMPT, n=3, return_token_ids=True, **SAMPLED)
    deltas = [delta async for delta in stream]

    assert [completion.index for completion in result.completions] == [0, 1, 2]
    assert len({completion.text for completion in result.completions}) > 1
    tokens = sum(len(completion.token_ids) for completion in result.completions)
    assert result.usage.generated_tokens == tokens
    assert stream.result.completions == result.completions
    for completion in result.completions:
        mine = [delta for delta in deltas if delta.index == completion.index]
        assert "".join(delta.text for delta in mine) == completion.text


async def test_the_best_of_several_completions(model: AsyncModel) -> None:
    require(model, "n", "best_of", "logprobs")

    def score(completion: Completion) -> float:
        return mean(told.logprob for told in completion.logprobs)

    every = await model.generate(PROMPT, n=4, logprobs=True, **SAMPLED)
    best = await model.generate(PROMPT, n=2, best_of=4, logprobs=True, **SAMPLED)

    ranked = sorted(every.completions, key=score, reverse=True)
    assert [completion.text for completion in best.completions] == [
        completion.text for completion in ranked[:2]
    ]
    assert [completion.index for completion in best.completions] == [0, 1]
    assert best.usage.generated_tokens == every.usage.generated_tokens


async def test_the_best_outputs_of_a_beam_search(model: AsyncModel) -> None:
    require(model, "num_beams", "length_penalty", "early_stopping")
    options: dict[str, Any] = {"num_beams": 4, "length_penalty": 0.5, "early_stopping": True}
    options |= {"max_new_tokens": 8, "return_token_ids": True, "bypass_prefix_cache": True}

    four = await model.generate(PROMPT, n=4, **options)
    stream = model.stream(PROMPT, n=2, **options)
    async for _ in stream:
        pass

    assert [completion.index for completion in four.completions] == [0, 1, 2, 3]
    assert len({completion.token_ids for completion in four.completions}) == 4
    assert stream.result.completions == four.completions[:2]
    assert (await model.generate(PROMPT, **options)).completions == four.completions[:1]


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"num_beams": 33}, "num_beams"),
        ({"num_beams": 2, "n": 3}, "n"),
        ({"num_beams": 2, "best_of": 2}, "best_of"),
        ({"num_beams": 2, "temperature": 0.7}, "temperature"),
        ({"num_beams": 2, "top_k": 5}, "top_k"),
        ({"num_beams": 2, "stop": "x"}, "stop"),
        ({"num_beams": 2, "logprobs": True}, "logprobs"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"early_stopping": True}, "early_stopping"),
    ],
)
async def test_what_does_not_go_with_beams_is_refused(
    model: AsyncModel, parameters: dict[str, Any], field: str
) -> None:
    require(model, "num_beams", *parameters)
    with pytest.raises(errors.InvalidArgumentError) as caught:
        await model.generate(PROMPT, **parameters)
    assert caught.value.field == field
