"""What a worker sends for one request, until its client has taken it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from loaderd.server.errors import LoaderdError, SlowConsumerError
from loaderd.v1.generation_pb2 import StreamGenerateResponse, TokenLogprob

Watch = Callable[[StreamGenerateResponse], None]
"""Told of a message when it comes from the worker, whenever its reader takes it."""


class OutputStream:
    """A queue of stream messages that joins what its reader has not taken yet.

    So a slow reader gets fewer, longer messages, and what waits for it is bounded: in number by
    the completions of the request, in size by `max_bytes` and the largest step. What one step
    brings comes all at once, before any reader can take of it, and so tells nothing of a reader.

    Args:
        max_bytes: Most bytes of text, token ids and log probabilities that may wait, beside as
            many as the largest step had.
        on_end: Called when the last message, or the failure, has come from the worker. The reader
            may take what waits long after that, or never.
        watch: Told of each message; None: nobody asked.

    Attributes:
        started: Whether its turn has come.
        ended: Whether no more comes.
        tokens: Tokens of the prompt and of what came so far. Until the end a delta counts as one,
            which is a little less than there are: some tokens give no text.
    """

    def __init__(
        self, max_bytes: int, on_end: Callable[[], None], watch: Watch | None = None
    ) -> None:
        self._max_bytes = max_bytes
        self._on_end = on_end
        self._watch = watch
        self._waiting: deque[StreamGenerateResponse] = deque()
        self._waiting_bytes = 0
        self._largest_step = 0
        self._error: LoaderdError | None = None
        self._changed = asyncio.Event()
        self.started = False
        self.ended = False
        self.tokens = 0

    def put(self, *messages: StreamGenerateResponse) -> None:
        """Adds a step's messages; `finished` ends the stream, as does a reader that is too slow."""
        if self.ended:
            return
        step = 0
        for message in messages:
            if self._watch is not None:
                self._watch(message)
            self.started |= not message.HasField("queued")
            step += _content_bytes(message)
            self._count(message)
            if not any(_join(waiting, message) for waiting in reversed(self._waiting)):
                self._waiting.append(message)
        self._waiting_bytes += step
        self._largest_step = max(self._largest_step, step)
        self._changed.set()
        if any(message.HasField("finished") for message in messages):
            self._end()
        elif self._waiting_bytes > self._max_bytes + self._largest_step:
            self.fail(SlowConsumerError(limit=self._max_bytes, unit="bytes"))

    def fail(self, error: LoaderdError) -> None:
        """Ends the stream with an error, after what waits already; nothing if it has ended."""
        if not self.ended:
            self._error = error
            self._changed.set()
            self._end()

    async def __aiter__(self) -> AsyncIterator[StreamGenerateResponse]:
        """The messages.

        Raises:
            LoaderdError: The stream failed.
        """
        while True:
            while self._waiting:
                message = self._waiting.popleft()
                self._waiting_bytes -= _content_bytes(message)
                yield message
            if self._error is not None:
                raise self._error
            if self.ended:
                return
            self._changed.clear()
            await self._changed.wait()

    def _count(self, message: StreamGenerateResponse) -> None:
        if message.HasField("started"):
            self.tokens += message.started.prompt_tokens
        elif message.HasField("delta"):
            self.tokens += 1
        elif message.HasField("finished"):
            usage = message.finished.usage
            self.tokens = usage.prompt_tokens + usage.generated_tokens

    def _end(self) -> None:
        self.ended = True
        self._on_end()


def _join(waiting: StreamGenerateResponse, message: StreamGenerateResponse) -> bool:
    """Adds a message to one that still waits, if they are of one kind and completion."""
    kind = message.WhichOneof("event")
    if kind != waiting.WhichOneof("event"):
        return False
    if kind == "delta" and waiting.delta.index == message.delta.index:
        waiting.delta.text += message.delta.text
        waiting.delta.token_ids.extend(message.delta.token_ids)
        waiting.delta.logprobs.extend(message.delta.logprobs)
        return True
    if kind == "prompt_logprobs":
        waiting.prompt_logprobs.logprobs.extend(message.prompt_logprobs.logprobs)
        return True
    if kind == "queued":
        waiting.queued.CopyFrom(message.queued)
        return True
    return False


def _content_bytes(message: StreamGenerateResponse) -> int:
    """Bytes of what may grow; those of joined messages add up."""
    delta, prompt = message.delta, message.prompt_logprobs
    logprobs: list[TokenLogprob] = [*delta.logprobs, *prompt.logprobs]
    return (
        len(delta.text.encode())
        + 4 * len(delta.token_ids)
        + sum(logprob.ByteSize() for logprob in logprobs)
    )
