"""Streaming, and stopping to."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from loaderd.client import AsyncClient, AsyncModel, FinishReason, errors
from tests.contract.backend import WAIT_S, Backend, eventually

PROMPT = "Once upon a time"
# Without known prefixes: in 16 bit a prompt that is computed in other pieces rounds otherwise.
GREEDY: dict[str, Any] = {"temperature": 0.0, "bypass_prefix_cache": True}


async def idle(model: AsyncModel) -> None:
    """Waits until no request runs on the model any more."""

    async def condition() -> bool:
        return (await model.refresh()).active_requests == 0

    await eventually(condition)


async def test_a_stream_is_the_same_as_generate(model: AsyncModel) -> None:
    whole = await model.generate(PROMPT, max_new_tokens=16, **GREEDY)
    stream = model.stream(PROMPT, max_new_tokens=16, request_id="contract-2", **GREEDY)

    deltas = [delta async for delta in stream]

    assert "".join(delta.text for delta in deltas) == whole.text
    assert stream.result.text == whole.text
    assert stream.result.finish == whole.finish
    assert stream.result.usage == whole.usage
    assert stream.result.request_id == "contract-2"
    assert stream.result.model_id == model.id
    assert {delta.index for delta in deltas} <= {0}
    assert [delta async for delta in stream] == []  # it has ended


async def test_what_is_known_at_the_start(model: AsyncModel) -> None:
    stream = model.stream(PROMPT, max_new_tokens=4, ignore_eos=True, seed=7, **GREEDY)
    assert stream.started is None

    await anext(aiter(stream))

    assert stream.started is not None
    assert stream.started.request_id
    assert stream.started.model_id == model.id
    assert stream.started.seed == 7
    assert stream.started.prompt_tokens == len((await model.tokenize(PROMPT)).token_ids)
    async for _ in stream:
        pass
    assert stream.result.seed == 7


async def test_tokens_come_along_when_asked_for(model: AsyncModel) -> None:
    stream = model.stream(PROMPT, max_new_tokens=8, return_token_ids=True, **GREEDY)

    token_ids = [token async for delta in stream for token in delta.token_ids]

    assert len(token_ids) == stream.result.usage.generated_tokens
    assert stream.result.token_ids == tuple(token_ids)


async def test_a_stop_string_never_shows_in_part(model: AsyncModel) -> None:
    whole = await model.generate(PROMPT, max_new_tokens=24, ignore_eos=True, **GREEDY)
    stop = whole.text[6:10]

    stream = model.stream(PROMPT, max_new_tokens=24, ignore_eos=True, stop=[stop], **GREEDY)
    text = "".join([delta.text async for delta in stream])

    assert text == whole.text[: whole.text.index(stop)]
    assert stream.result.finish.reason is FinishReason.STOP
    assert stream.result.finish.stop_string == stop


async def test_there_is_no_result_before_the_end(model: AsyncModel, backend: Backend) -> None:
    async with model.stream(PROMPT, **backend.long) as stream:
        await anext(aiter(stream))
        with pytest.raises(RuntimeError):
            _ = stream.result


async def test_cancel_frees_the_model(model: AsyncModel, backend: Backend) -> None:
    stream = model.stream(PROMPT, **backend.long)
    await anext(aiter(stream))
    assert (await model.refresh()).active_requests == 1

    stream.cancel()

    with pytest.raises(errors.CallCancelledError):
        async for _ in stream:
            pass
    with pytest.raises(errors.CallCancelledError):
        await anext(aiter(stream))
    await idle(model)
    assert (await model.generate(PROMPT, max_new_tokens=1)).usage.generated_tokens == 1


async def test_leaving_the_context_frees_the_model(model: AsyncModel, backend: Backend) -> None:
    async with model.stream(PROMPT, **backend.long) as stream:
        await anext(aiter(stream))

    await idle(model)


async def test_an_abandoned_stream_frees_the_model(model: AsyncModel, backend: Backend) -> None:
    async for delta in model.stream(PROMPT, **backend.long):
        assert delta.index == 0
        break

    await idle(model)


async def test_streams_do_not_disturb_each_other(client: AsyncClient, backend: Backend) -> None:
    """In float32: 16 bits round so coarsely that the size of a batch may change a token."""
    model = await client.load(backend.model, dtype="float32")
    prompts = [f"{PROMPT} number {number}" for number in range(16)]
    asked: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seed": 5}
    alone = [(await model.generate(prompt, **asked)).text for prompt in prompts[:3]]

    async def read(prompt: str) -> str:
        return "".join([delta.text async for delta in model.stream(prompt, **asked)])

    together = await asyncio.gather(*map(read, prompts))
    await model.unload()

    assert together[:3] == alone


async def test_a_deadline_ends_a_stream(model: AsyncModel, backend: Backend) -> None:
    stream = model.stream(PROMPT, timeout=0.1, **backend.long)

    with pytest.raises(errors.DeadlineError):
        async for _ in stream:
            pass
    await idle(model)


async def test_a_deadline_ends_generate(model: AsyncModel, backend: Backend) -> None:
    with pytest.raises(errors.DeadlineError):
        await model.generate(PROMPT, timeout=0.1, **backend.long)
    await idle(model)


async def test_a_busy_model_stays_unless_forced(model: AsyncModel, backend: Backend) -> None:
    stream = model.stream(PROMPT, **backend.long)
    await anext(aiter(stream))

    with pytest.raises(errors.ModelInUseError) as caught:
        await model.unload()
    assert caught.value.active_requests == 1

    await model.unload(force=True)
    with pytest.raises(errors.ModelUnloadedError):
        async for _ in stream:
            pass


async def test_closing_the_client_ends_its_streams(client: AsyncClient, backend: Backend) -> None:
    other = await client.load(backend.model)
    stream = other.stream(PROMPT, **backend.long)
    await anext(aiter(stream))
    reader = asyncio.ensure_future(_read_on(stream))

    await client.close()

    with pytest.raises(errors.CallCancelledError):
        await asyncio.wait_for(reader, WAIT_S)
    with pytest.raises(RuntimeError, match="closed"):
        await client.info()


async def _read_on(stream: Any) -> None:
    async for _ in stream:
        pass
