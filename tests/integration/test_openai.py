"""OpenAI's own client and curl, against the daemon with a tiny model."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai as api
import pytest
from openai import AsyncOpenAI, OpenAI

from loaderd.client import Client, Model
from tests.daemon import SpawnedDaemon
from tests.waiting import until

QUESTION: Any = [{"role": "user", "content": "Why is the sky blue?"}]
# In 16 bit a prompt that is computed in other pieces, as with a known prefix, rounds otherwise.
EXACT: dict[str, Any] = {"bypass_prefix_cache": True}


@pytest.fixture(scope="module")
def model(shared_daemon: SpawnedDaemon, tiny_model: Path) -> Iterator[Model]:
    """The tiny model, loaded once for this file."""
    with Client(shared_daemon.address) as client:
        loaded = client.load(str(tiny_model))
        yield loaded
        loaded.unload(force=True)


@pytest.fixture
def openai(shared_daemon: SpawnedDaemon, model: Model) -> Iterator[OpenAI]:
    url = f"{shared_daemon.http_url}/v1"
    with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_a_chat_whole_and_as_it_comes_is_that_of_the_sdk(openai: OpenAI, model: Model) -> None:
    options: Any = {"messages": QUESTION, "model": model.name, "max_tokens": 12, "temperature": 0}
    whole = openai.chat.completions.create(**options, extra_body=EXACT)
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12
    stream = openai.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}, extra_body=EXACT
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == choice.message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage
    same = model.generate(messages=QUESTION, max_new_tokens=12, temperature=0, **EXACT)
    assert text == same.text


def test_several_answers_with_a_seed(openai: OpenAI, model: Model) -> None:
    def sample(seed: int) -> list[str | None]:
        answer = openai.chat.completions.create(
            model=model.name,
            messages=QUESTION,
            max_completion_tokens=16,
            n=3,
            seed=seed,
            temperature=1.2,
            top_p=0.95,
            extra_body=EXACT,
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    first = sample(7)
    assert len(set(first)) > 1
    assert sample(7) == first
    assert sample(8) != first


def test_several_answers_as_they_come(openai: OpenAI, model: Model) -> None:
    stream = openai.chat.completions.create(
        model=model.name, messages=QUESTION, max_tokens=6, n=2, stream=True, temperature=1
    )
    ends = [
        (choice.index, choice.finish_reason)
        for chunk in stream
        for choice in chunk.choices
        if choice.finish_reason
    ]
    assert sorted(ends) == [(0, "length"), (1, "length")]


def test_log_probabilities(openai: OpenAI, model: Model) -> None:
    chat = openai.chat.completions.create(
        model=model.name,
        messages=QUESTION,
        max_tokens=3,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    told = chat.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert [len(token.top_logprobs) for token in told.content] == [2, 2, 2]
    for token in told.content:  # greedy: the token is the most probable one
        assert token.token == token.top_logprobs[0].token
        assert token.logprob == token.top_logprobs[0].logprob <= 0
    text = openai.completions.create(
        model=model.name, prompt="The sky", max_tokens=3, temperature=0, logprobs=2
    )
    listed = text.choices[0].logprobs
    assert listed is not None
    assert len(listed.tokens or []) == len(listed.token_logprobs or []) == 3
    assert (listed.text_offset or [1])[0] == 0


def test_stops_biases_and_prompts(openai: OpenAI, model: Model) -> None:
    def complete(**options: Any) -> Any:
        answer = openai.completions.create(
            model=model.name, max_tokens=12, temperature=0, **options, extra_body=EXACT
        )
        return answer.choices[0]

    plain = complete(prompt="The sky")
    mark = plain.text[2:4]
    stopped = complete(prompt="The sky", stop=mark)
    assert stopped.finish_reason == "stop"
    assert stopped.text == plain.text[: plain.text.index(mark)]
    ids = model.tokenize("The sky").token_ids
    assert complete(prompt=list(ids)).text == plain.text
    assert complete(prompt="The sky", echo=True).text == "The sky" + plain.text
    only = model.tokenize("a").token_ids[0]
    assert complete(prompt="The sky", logit_bias={str(only): 100}).text == "a" * 12


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"n": 33}, "n"),
        ({"logit_bias": {"1": 200}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    openai: OpenAI, model: Model, options: dict[str, Any], param: str
) -> None:
    for stream in (False, True):
        with pytest.raises(api.BadRequestError) as caught:
            openai.chat.completions.create(
                model=model.name, messages=QUESTION, stream=stream, **options
            )
        assert caught.value.param == param


async def test_many_streams_at_once(shared_daemon: SpawnedDaemon, model: Model) -> None:
    url = f"{shared_daemon.http_url}/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", timeout=60) as openai:

        async def ask(seed: int) -> str:
            stream = await openai.chat.completions.create(
                model=model.name, messages=QUESTION, max_tokens=10, stream=True, seed=seed
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream])

        answers = await asyncio.gather(*(ask(seed) for seed in range(6)))
        assert all(answers)
        assert [each.id async for each in openai.models.list()] == [model.name]


def test_a_client_that_leaves_frees_the_engine(openai: OpenAI, model: Model) -> None:
    long: Any = {"max_tokens": 200, "extra_body": {"ignore_eos": True}}
    stream = openai.chat.completions.create(
        model=model.name, messages=QUESTION, stream=True, **long
    )
    next(iter(stream))
    stream.close()
    until(lambda: model.refresh().active_requests == 0)


def test_a_prompt_that_is_too_long(openai: OpenAI, model: Model) -> None:
    with pytest.raises(api.BadRequestError, match="256"):
        openai.completions.create(model=model.name, prompt="word " * 400)


def curl(*arguments: str) -> str:
    done = subprocess.run(
        ["curl", "-sS", "-N", "--max-time", "60", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_curl_reads_events(shared_daemon: SpawnedDaemon, model: Model) -> None:
    body = {"model": model.name, "prompt": "The sky", "max_tokens": 4, "stream": True}
    told = curl(
        f"{shared_daemon.http_url}/v1/completions",
        "--json",
        json.dumps(body),
    )
    lines = [line for line in told.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_curl_reads_metrics_and_probes(shared_daemon: SpawnedDaemon, model: Model) -> None:
    url = shared_daemon.http_url
    model.generate("The sky", max_new_tokens=3)
    generated = re.compile(
        rf'^loaderd_generated_tokens_total{{model="{re.escape(model.name)}"}} ([\d.]+)$',
        re.MULTILINE,
    )

    def tokens(metrics: str) -> float:
        found = generated.search(metrics)
        return float(found[1]) if found else 0.0

    until(lambda: tokens(curl(f"{url}/metrics")) >= 3)  # engines report once a second
    metrics = curl(f"{url}/metrics")
    assert f'loaderd_kv_capacity_tokens{{model="{model.name}"}}' in metrics
    assert 'loaderd_load_seconds_count{phase="weights"}' in metrics
    assert curl(f"{url}/healthz") == "ok\n"
    assert curl(f"{url}/readyz") == "ok\n"


def test_what_clients_send_is_not_in_the_log(
    shared_daemon: SpawnedDaemon, openai: OpenAI, model: Model
) -> None:
    secret = "xyzzy-plugh-4712"
    messages: Any = [{"role": "user", "content": secret}]
    openai.chat.completions.create(
        model=model.name, messages=messages, max_tokens=3, user=f"user-{secret}"
    )
    assert secret not in shared_daemon.log
