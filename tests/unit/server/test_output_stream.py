import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaderd.server.errors import SlowConsumerError, WorkerDiedError
from loaderd.server.supervisor.link import WorkerLink
from loaderd.server.supervisor.output_stream import OutputStream
from loaderd.v1.generation_pb2 import (
    GenerationDelta,
    GenerationFinished,
    GenerationQueued,
    GenerationStarted,
    PromptLogprobs,
    StreamGenerateRequest,
    StreamGenerateResponse,
    TokenAlternative,
    TokenLogprob,
)
from loaderd.worker.v1.worker_pb2 import AttachRequest, Output, Step


def delta(text: str, *token_ids: int, index: int = 0) -> StreamGenerateResponse:
    return StreamGenerateResponse(
        delta=GenerationDelta(index=index, text=text, token_ids=token_ids)
    )


def logprob(token_id: int) -> TokenLogprob:
    top = [TokenAlternative(token_id=token_id, text="a", logprob=-0.5)]
    return TokenLogprob(token_id=token_id, text="a", logprob=-0.5, top=top)


STARTED = StreamGenerateResponse(started=GenerationStarted(prompt_tokens=3))
FINISHED = StreamGenerateResponse(finished=GenerationFinished(seed=7))


async def collect(stream: OutputStream) -> list[StreamGenerateResponse]:
    return [message async for message in stream]


async def test_text_that_was_not_taken_comes_in_one_message() -> None:
    stream = OutputStream(1000, lambda: None)
    for message in (STARTED, delta("a", 1), delta("b", 2), delta("c", 3), FINISHED):
        stream.put(message)
    started, joined, finished = await collect(stream)
    assert started.started.prompt_tokens == 3
    assert (joined.delta.text, list(joined.delta.token_ids)) == ("abc", [1, 2, 3])
    assert finished.finished.seed == 7


@given(st.lists(st.tuples(st.integers(0, 2), st.text(max_size=3), st.booleans()), max_size=30))
def test_each_index_keeps_its_text_in_order_however_slow_the_reader(
    parts: list[tuple[int, str, bool]],
) -> None:
    async def run() -> dict[int, str]:
        stream = OutputStream(1 << 20, lambda: None)
        texts: dict[int, str] = {0: "", 1: "", 2: ""}

        async def read() -> None:
            async for message in stream:
                texts[message.delta.index] += message.delta.text

        reader = asyncio.create_task(read())
        for index, text, pause in parts:
            stream.put(delta(text, index=index))
            if pause:
                await asyncio.sleep(0)
        stream.put(FINISHED)
        await reader
        return texts

    texts = asyncio.run(run())
    for index, text in texts.items():
        assert text == "".join(part for at, part, _ in parts if at == index)


async def test_a_reader_that_is_too_slow_is_cut_off_and_memory_stays_bounded() -> None:
    stream = OutputStream(1000, lambda: None)
    for _ in range(100):
        stream.put(delta("x" * 100))
    assert stream.ended
    received = 0
    with pytest.raises(SlowConsumerError):
        async for message in stream:
            received += len(message.delta.text)
    assert 0 < received <= 1200


async def test_a_step_is_no_sign_of_a_slow_reader_however_large() -> None:
    stream = OutputStream(1000, lambda: None)
    stream.put(STARTED, *(delta("x" * 500, index=index) for index in range(8)))
    for _ in range(10):
        stream.put(*(delta("y" * 10, index=index) for index in range(8)))
    assert not stream.ended
    for _ in range(10):
        stream.put(*(delta("z" * 10, index=index) for index in range(8)))
    received = 0
    with pytest.raises(SlowConsumerError):
        async for message in stream:
            received += len(message.delta.text)
    assert 5000 < received <= 5080


async def test_outputs_that_all_come_at_the_end_arrive() -> None:
    stream = OutputStream(1000, lambda: None)
    stream.put(*(delta("x" * 100, token_id) for token_id in range(100)), FINISHED)
    text, _ = await collect(stream)
    assert text.delta.text == "x" * 10_000


async def test_the_completions_of_a_request_wait_in_one_message_each() -> None:
    stream = OutputStream(1 << 20, lambda: None)
    for token_id in range(200):
        for index in range(3):
            message = delta("x", token_id, index=index)
            message.delta.logprobs.append(logprob(token_id))
            stream.put(message)
    stream.put(FINISHED)
    *deltas, _ = await collect(stream)
    assert [message.delta.index for message in deltas] == [0, 1, 2]
    for message in deltas:
        assert list(message.delta.token_ids) == list(range(200))
        assert [told.token_id for told in message.delta.logprobs] == list(range(200))


async def test_log_probabilities_count_as_what_waits() -> None:
    stream = OutputStream(1000, lambda: None)
    for token_id in range(100):
        stream.put(StreamGenerateResponse(delta=GenerationDelta(logprobs=[logprob(token_id)])))
    with pytest.raises(SlowConsumerError):
        await collect(stream)


async def test_log_probabilities_of_the_prompt_stay_in_order_and_bounded() -> None:
    def piece(*token_ids: int) -> StreamGenerateResponse:
        told = PromptLogprobs(logprobs=[logprob(token_id) for token_id in token_ids])
        return StreamGenerateResponse(prompt_logprobs=told)

    stream = OutputStream(1000, lambda: None)
    for message in (STARTED, piece(1, 2), piece(3), delta("a"), FINISHED):
        stream.put(message)
    _, prompt, first, _ = await collect(stream)
    assert [told.token_id for told in prompt.prompt_logprobs.logprobs] == [1, 2, 3]
    assert first.delta.text == "a"

    stream = OutputStream(1000, lambda: None)
    for begin in (0, 100):
        stream.put(piece(*range(begin, begin + 100)))
    with pytest.raises(SlowConsumerError):
        await collect(stream)


async def test_of_the_places_in_the_queue_only_the_last_waits() -> None:
    stream = OutputStream(1000, lambda: None)
    for position in (3, 2, 1):
        stream.put(StreamGenerateResponse(queued=GenerationQueued(position=position)))
    for message in (STARTED, FINISHED):
        stream.put(message)
    queued, started, _ = await collect(stream)
    assert queued.queued.position == 1
    assert started.HasField("started")


async def test_what_was_taken_is_not_joined_with_what_comes() -> None:
    stream = OutputStream(1000, lambda: None)
    reader = aiter(stream)
    stream.put(delta("a"))
    assert (await anext(reader)).delta.text == "a"
    stream.put(delta("b"))
    assert (await anext(reader)).delta.text == "b"


async def test_text_before_a_failure_still_arrives() -> None:
    stream = OutputStream(1000, lambda: None)
    stream.put(delta("so far"))
    stream.fail(WorkerDiedError(model="org/name"))
    stream.put(delta("too late"))
    texts = []
    with pytest.raises(WorkerDiedError):
        async for message in stream:
            texts.append(message.delta.text)
    assert texts == ["so far"]


async def test_the_outputs_of_one_step_of_the_worker_are_one_step_of_the_stream() -> None:
    link = WorkerLink(1000)
    with link.generate(StreamGenerateRequest(), lambda: None) as stream:
        outputs = [
            Output(key=1, delta=GenerationDelta(index=index, text="x" * 500)) for index in range(8)
        ]
        link.receive(AttachRequest(step=Step(outputs=outputs)))
        link.receive(AttachRequest(step=Step(outputs=[Output(key=1, finished=FINISHED.finished)])))
        *deltas, _ = await collect(stream)
    assert [message.delta.index for message in deltas] == list(range(8))
