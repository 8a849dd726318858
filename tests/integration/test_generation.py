"""Text from the real model through the daemon."""

import asyncio
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from loaderd.client import AsyncClient, Client, FinishReason, Model, errors
from tests.daemon import SpawnedDaemon
from tests.waiting import until

QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]
# In 16 bit a prompt that is computed in other pieces, as with a known prefix, rounds otherwise.
EXACT: dict[str, Any] = {"bypass_prefix_cache": True}

PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Zwölf Boxkämpfer — 你好 🙂"]
# What transformers does by itself, in a process of its own: the tests' one needs no torch.
REFERENCE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, dtypes, prompts = sys.argv[1], *map(json.loads, sys.argv[2:])
tokenizer = AutoTokenizer.from_pretrained(folder)
answers = {dtype: [] for dtype in dtypes}
for dtype in dtypes:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(
            **ids, do_sample=False, max_new_tokens=24,
            output_logits=True, return_dict_in_generate=True,
        )
        best = torch.cat(out.logits).float().topk(2).values
        tokens = out.sequences[0, ids["input_ids"].shape[1]:].tolist()
        answers[dtype].append([tokens, (best[:, 0] - best[:, 1]).tolist()])
print(json.dumps(answers))
"""
ROUNDING = {"float32": 0.0, "bfloat16": 0.3}
"""Logits as near as this may change places."""


@pytest.fixture(scope="module")
def model(shared_daemon: SpawnedDaemon, real_model: Path) -> Model:
    """The real model, loaded once for this file.

    In 32 bits, where another order of sums changes no token: it changes when copies of the weights
    are ready, some time after the load.
    """
    return Client(shared_daemon.address).load(str(real_model), dtype="float32")


@pytest.fixture
def client(shared_daemon: SpawnedDaemon) -> Client:
    return Client(shared_daemon.address)


@pytest.fixture(autouse=True, scope="module")
def unload(shared_daemon: SpawnedDaemon, model: Model) -> object:
    yield
    model.unload(force=True)


@pytest.fixture(scope="module")
def references(real_model: Path) -> Any:
    """By dtype, for each prompt: transformers' tokens, and how far ahead of the next each was."""
    arguments = [str(real_model), json.dumps(list(ROUNDING)), json.dumps(PROMPTS)]
    command = [sys.executable, "-c", REFERENCE, *arguments]
    run = subprocess.run(command, capture_output=True, check=True, timeout=120)
    return json.loads(run.stdout)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_greedy_tokens_are_those_of_transformers(
    client: Client,
    model: Model,
    real_model: Path,
    references: Any,
    dtype: str,
    request: pytest.FixtureRequest,
) -> None:
    other = client.load(str(real_model), dtype=dtype)  # type: ignore[arg-type]
    if other.id != model.id:
        request.addfinalizer(lambda: other.unload(force=True))
    for prompt, (token_ids, gaps) in zip(PROMPTS, references[dtype], strict=True):
        options = {"max_new_tokens": 24, "return_token_ids": True, **EXACT}
        result = other.generate(prompt, do_sample=False, **options)
        sure = next((i for i, gap in enumerate(gaps) if gap <= ROUNDING[dtype]), len(gaps))
        assert list(result.token_ids)[:sure] == token_ids[:sure]
        with other.stream(prompt, temperature=0, **options) as stream:
            streamed = [token for delta in stream for token in delta.token_ids]
        assert streamed[:sure] == token_ids[:sure]


def test_a_chat_is_answered_in_english(model: Model) -> None:
    result = model.generate(messages=QUESTION, max_new_tokens=60, do_sample=False)
    assert "sky" in result.text
    assert "<|im" not in result.text
    assert result.usage.prompt_tokens > 10
    assert result.usage.generated_tokens <= 60
    assert result.timings.time_to_first_token > timedelta(0)


def test_the_stream_is_the_answer_in_pieces(model: Model) -> None:
    whole = model.generate(messages=QUESTION, max_new_tokens=30, do_sample=False, **EXACT)
    with model.stream(messages=QUESTION, max_new_tokens=30, do_sample=False, **EXACT) as stream:
        pieces = [delta.text for delta in stream]
    assert len(pieces) > 5
    assert "".join(pieces) == whole.text == stream.result.text
    assert stream.started is not None
    assert stream.started.prompt_tokens == whole.usage.prompt_tokens
    assert stream.started.model_id == model.id


def test_a_seed_repeats_and_another_differs(model: Model) -> None:
    def sample(seed: int) -> str:
        return model.generate(
            "Once upon a time", temperature=1.0, top_p=0.95, seed=seed, max_new_tokens=24, **EXACT
        ).text

    first = sample(7)
    assert sample(7) == first
    assert sample(8) != first
    drawn = model.generate("Once upon a time", temperature=1.0, max_new_tokens=24, **EXACT)
    repeated = model.generate(
        "Once upon a time", temperature=1.0, max_new_tokens=24, seed=drawn.seed, **EXACT
    )
    assert repeated.text == drawn.text


def test_every_way_to_end(model: Model) -> None:
    prompt = "1, 2, 3, 4, 5, 6, 7, 8,"
    length = model.generate(prompt, max_new_tokens=5, do_sample=False)
    assert length.finish.reason is FinishReason.LENGTH
    assert length.usage.generated_tokens == 5
    stopped = model.generate(prompt, max_new_tokens=40, do_sample=False, stop=["12"])
    assert stopped.finish.reason is FinishReason.STOP
    assert stopped.finish.stop_string == "12"
    assert "12" not in stopped.text
    assert stopped.text.rstrip().endswith("11,")
    timed = model.generate(prompt, max_new_tokens=4000, ignore_eos=True, max_time=0.5)
    assert timed.finish.reason is FinishReason.TIME
    ended = model.generate(
        messages=[{"role": "user", "content": "Say hi."}], max_new_tokens=200, do_sample=False
    )
    assert ended.finish.reason is FinishReason.STOP
    assert ended.finish.eos_token_id is not None


def test_token_ids_text_and_messages_are_one_prompt(model: Model) -> None:
    rendered = model.apply_chat_template(QUESTION)
    assert "Why is the sky blue?" in rendered.text
    options = {"max_new_tokens": 10, "do_sample": False, **EXACT}
    by_messages = model.generate(messages=QUESTION, **options)
    by_ids = model.generate(token_ids=rendered.token_ids, **options)
    assert by_ids.text == by_messages.text
    assert model.tokenize(messages=QUESTION).token_ids == rendered.token_ids


def test_tokens_and_back(model: Model) -> None:
    text = "Hello,  wörld! 你好 🙂\n"
    tokens = model.tokenize(text)
    assert len(tokens.token_ids) == len(tokens.tokens)
    assert model.detokenize(tokens.token_ids) == text


def test_a_cancelled_stream_stops_computing(client: Client, model: Model) -> None:
    stream = model.stream("One, two,", max_new_tokens=4000, ignore_eos=True)
    next(iter(stream))
    assert model.refresh().active_requests == 1
    stream.cancel()
    until(lambda: model.refresh().active_requests == 0)
    # The engine is free again: it takes one request at a time.
    assert model.generate("Hi", max_new_tokens=2, timeout=20).usage.generated_tokens <= 2


def test_an_abandoned_stream_stops_computing(model: Model) -> None:
    for _ in model.stream("One, two,", max_new_tokens=4000, ignore_eos=True):
        break
    until(lambda: model.refresh().active_requests == 0)


def test_a_deadline_ends_the_call_and_the_computation(model: Model) -> None:
    with pytest.raises(errors.DeadlineError):
        model.generate("One, two,", max_new_tokens=4000, ignore_eos=True, timeout=0.7)
    until(lambda: model.refresh().active_requests == 0)


def test_two_clients_at_once(shared_daemon: SpawnedDaemon, model: Model) -> None:
    def ask(question: str) -> str:
        with Client(shared_daemon.address) as mine:
            return mine.model(model.id).generate(question, max_new_tokens=8, do_sample=False).text

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(ask, ["The sun is", "The moon is"]))
    assert together == [ask("The sun is"), ask("The moon is")]


async def test_the_async_client_streams_and_cancels(
    shared_daemon: SpawnedDaemon, model: Model
) -> None:
    async with AsyncClient(shared_daemon.address) as client:
        mine = await client.model(model.id)
        text = ""
        options = {"max_new_tokens": 8, "do_sample": False, **EXACT}
        async with mine.stream(messages=QUESTION, **options) as stream:
            async for delta in stream:
                text += delta.text
        answer = await mine.generate(messages=QUESTION, **options)
        assert text == answer.text

        task = asyncio.create_task(mine.generate("One", max_new_tokens=4000, ignore_eos=True))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(20):
            while (await mine.refresh()).active_requests:
                await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 100_000}, "max_new_tokens"),
        ({"do_sample": False, "temperature": 0.7}, "do_sample"),
        ({"stop": [""]}, "stop"),
        ({"num_beams": 33}, "num_beams"),
        ({"num_beams": 4, "top_p": 0.9}, "top_p"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"logit_bias": {1: 200.0}}, "logit_bias"),
        ({"n": 33}, "n"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
        ({"request_id": "bad\nid"}, "request_id"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    model: Model, parameters: dict[str, object], field: str
) -> None:
    with pytest.raises((errors.InvalidArgumentError, errors.UnsupportedOptionError)) as caught:
        model.generate("Hello", **parameters)  # type: ignore[arg-type]
    assert caught.value.metadata["field"] == field
    with pytest.raises((errors.InvalidArgumentError, errors.UnsupportedOptionError)):
        list(model.stream("Hello", **parameters))  # type: ignore[arg-type]


def test_a_prompt_that_is_too_long_says_how_long(model: Model) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="8192"):
        model.generate("word " * 9000)


def test_prompts_and_outputs_are_not_in_the_log(shared_daemon: SpawnedDaemon, model: Model) -> None:
    secret = "xyzzy-plugh-4711"
    result = model.generate(f"The code is {secret}. Repeat:", max_new_tokens=20, do_sample=False)
    assert result.text.strip()
    assert secret not in shared_daemon.log
    assert result.text.strip() not in shared_daemon.log
