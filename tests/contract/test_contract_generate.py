"""Generating at once, and what goes in and comes out."""

from __future__ import annotations

from typing import Any

import pytest

from loaderd.client import AsyncModel, FinishReason, Message, errors

PROMPT = "The quick brown fox"
CHAT = [{"role": "user", "content": "Say something."}]
# Without known prefixes: in 16 bit a prompt that is computed in other pieces rounds otherwise.
GREEDY: dict[str, Any] = {"temperature": 0.0, "bypass_prefix_cache": True}


async def test_generate_answers_with_everything(model: AsyncModel) -> None:
    result = await model.generate(PROMPT, max_new_tokens=12, request_id="contract-1", **GREEDY)

    assert result.text == result.completions[0].text
    assert result.finish == result.completions[0].finish
    assert result.request_id == "contract-1"
    assert result.model_id == model.id
    assert result.token_ids == ()  # not asked for
    assert 1 <= result.usage.generated_tokens <= 12
    assert result.usage.prompt_tokens == len((await model.tokenize(PROMPT)).token_ids)
    assert result.finish.reason in {FinishReason.LENGTH, FinishReason.STOP}


async def test_the_daemon_makes_a_request_id(model: AsyncModel) -> None:
    assert (await model.generate(PROMPT, max_new_tokens=1)).request_id


async def test_max_new_tokens_ends_it(model: AsyncModel) -> None:
    result = await model.generate(PROMPT, max_new_tokens=3, ignore_eos=True, **GREEDY)

    assert result.usage.generated_tokens == 3
    assert result.finish.reason is FinishReason.LENGTH


async def test_greedy_is_deterministic(model: AsyncModel) -> None:
    first = await model.generate(PROMPT, max_new_tokens=16, **GREEDY)
    second = await model.generate(PROMPT, max_new_tokens=16, **GREEDY)

    assert first.text == second.text


async def test_the_seed_that_comes_back_gives_the_same_text(model: AsyncModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 16, "temperature": 0.9}
    options["bypass_prefix_cache"] = True  # as for GREEDY
    drawn = await model.generate(PROMPT, **options)
    again = await model.generate(PROMPT, seed=drawn.seed, **options)

    assert again.seed == drawn.seed
    assert again.text == drawn.text


async def test_a_seed_is_echoed(model: AsyncModel) -> None:
    largest = 2**64 - 1

    assert (await model.generate(PROMPT, max_new_tokens=1, seed=largest)).seed == largest


async def test_token_ids_go_in_as_they_are(model: AsyncModel) -> None:
    token_ids = (await model.tokenize(PROMPT)).token_ids

    by_text = await model.generate(PROMPT, max_new_tokens=8, **GREEDY)
    by_tokens = await model.generate(token_ids=token_ids, max_new_tokens=8, **GREEDY)

    assert by_tokens.text == by_text.text
    assert by_tokens.usage.prompt_tokens == len(token_ids)


async def test_messages_may_be_mappings_or_messages(model: AsyncModel) -> None:
    mappings = await model.generate(messages=CHAT, max_new_tokens=8, **GREEDY)
    messages = await model.generate(
        messages=[Message(**message) for message in CHAT], max_new_tokens=8, **GREEDY
    )

    assert messages.text == mappings.text
    assert messages.usage.prompt_tokens == mappings.usage.prompt_tokens


async def test_returned_tokens_are_those_that_were_counted(model: AsyncModel) -> None:
    result = await model.generate(messages=CHAT, max_new_tokens=8, return_token_ids=True, **GREEDY)

    assert len(result.token_ids) == result.usage.generated_tokens


async def test_a_stop_string_ends_the_text_before_it(model: AsyncModel) -> None:
    whole = await model.generate(PROMPT, max_new_tokens=24, ignore_eos=True, **GREEDY)
    stop = whole.text[5:8]
    place = whole.text.index(stop)

    stopped = await model.generate(PROMPT, max_new_tokens=24, ignore_eos=True, stop=stop, **GREEDY)
    kept = await model.generate(
        PROMPT,
        max_new_tokens=24,
        ignore_eos=True,
        stop=["never in there", stop],
        include_stop_str_in_output=True,
        **GREEDY,
    )

    assert stopped.text == whole.text[:place]
    assert stopped.finish.reason is FinishReason.STOP
    assert stopped.finish.stop_string == stop
    assert stopped.finish.eos_token_id is None
    assert kept.text == whole.text[:place] + stop


async def test_a_stop_token_ends_it(model: AsyncModel) -> None:
    whole = await model.generate(
        PROMPT, max_new_tokens=8, ignore_eos=True, return_token_ids=True, **GREEDY
    )
    token = whole.token_ids[3]

    stopped = await model.generate(
        PROMPT,
        max_new_tokens=8,
        ignore_eos=True,
        return_token_ids=True,
        stop_token_ids=[token],
        **GREEDY,
    )

    assert stopped.finish.stop_token_id == token
    assert stopped.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"seed": -1}, "seed"),
    ],
)
async def test_a_value_out_of_bounds_names_its_field(
    model: AsyncModel, parameters: dict[str, Any], field: str
) -> None:
    with pytest.raises(errors.InvalidArgumentError) as caught:
        await model.generate(PROMPT, **parameters)

    assert caught.value.field == field


async def test_what_the_engine_does_not_honour_is_refused(model: AsyncModel) -> None:
    assert model.details is not None
    values: dict[str, Any] = {"prompt_logprobs": 2, "cache_salt": "x", "n": 2}
    unsupported = [name for name in values if name not in model.details.supported_parameters]

    for name in unsupported:
        with pytest.raises(errors.UnsupportedOptionError) as caught:
            await model.generate(PROMPT, max_new_tokens=1, **{name: values[name]})
        assert caught.value.field == name


async def test_an_unknown_token_is_refused(model: AsyncModel) -> None:
    with pytest.raises(errors.InvalidArgumentError):
        await model.generate(token_ids=[2**31], max_new_tokens=1)
    with pytest.raises(errors.InvalidArgumentError):
        await model.detokenize([2**31])


async def test_tokenize_and_detokenize_are_inverse(model: AsyncModel) -> None:
    tokens = await model.tokenize(PROMPT, add_special_tokens=False)

    assert len(tokens.tokens) == len(tokens.token_ids)
    assert await model.detokenize(tokens.token_ids) == PROMPT


async def test_the_chat_template_is_what_messages_become(model: AsyncModel) -> None:
    rendered = await model.apply_chat_template(CHAT)
    closed = await model.apply_chat_template(CHAT, add_generation_prompt=False)
    tokens = await model.tokenize(messages=CHAT)
    answer = await model.generate(messages=CHAT, max_new_tokens=1)

    assert CHAT[0]["content"] in rendered.text
    assert tokens.token_ids == rendered.token_ids
    assert answer.usage.prompt_tokens == len(rendered.token_ids)
    assert rendered.text.startswith(closed.text)
    assert rendered.text != closed.text


async def test_the_chat_template_gets_its_variables(model: AsyncModel) -> None:
    off: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}
    plain = await model.apply_chat_template(CHAT)
    on = await model.apply_chat_template(CHAT, chat_template_kwargs={"enable_thinking": True})
    rendered = await model.apply_chat_template(CHAT, **off)
    tokens = await model.tokenize(messages=CHAT, **off)
    answer = await model.generate(messages=CHAT, max_new_tokens=1, **off)
    async with model.stream(messages=CHAT, max_new_tokens=1, **off) as stream:
        async for _ in stream:
            pass

    assert on == plain
    assert rendered.text == plain.text + "<think></think>"
    assert tokens.token_ids == rendered.token_ids
    assert answer.usage.prompt_tokens == len(rendered.token_ids)
    assert stream.result.usage.prompt_tokens == len(rendered.token_ids)


async def test_a_variable_that_the_chat_template_does_not_read_is_refused(
    model: AsyncModel,
) -> None:
    unread: dict[str, Any] = {"chat_template_kwargs": {"enable_thinknig": False}}
    for call in (
        model.apply_chat_template(CHAT, **unread),
        model.tokenize(messages=CHAT, **unread),
        model.generate(messages=CHAT, max_new_tokens=1, **unread),
    ):
        with pytest.raises(errors.UnsupportedOptionError, match="enable_thinking") as caught:
            await call
        assert caught.value.field == "chat_template_kwargs"
        assert "'enable_thinknig'" in str(caught.value)


async def test_variables_of_the_chat_template_go_with_messages_only(model: AsyncModel) -> None:
    variables: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}
    for call in (
        model.tokenize(PROMPT, **variables),
        model.generate(PROMPT, max_new_tokens=1, **variables),
        model.generate(token_ids=[65], max_new_tokens=1, **variables),
    ):
        with pytest.raises(errors.InvalidArgumentError) as caught:
            await call
        assert caught.value.field == "chat_template_kwargs"
