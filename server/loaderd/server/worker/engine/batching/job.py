"""One request in the engine: its completions, and what it tells its client."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from loaderd.server.errors import LoaderdError
from loaderd.server.worker.engine.clock import Clock
from loaderd.server.worker.engine.completion import Completion, Tokenizer
from loaderd.server.worker.engine.protocol import GenerationRequest, SampledToken
from loaderd.server.worker.failures import error_message
from loaderd.v1.generation_pb2 import (
    Finish,
    FinishReason,
    GenerationDelta,
    GenerationFinished,
    GenerationQueued,
    GenerationStarted,
    PromptLogprobs,
    TokenLogprob,
    Usage,
)
from loaderd.worker.v1.worker_pb2 import Output

_SEEDS = 2**64


@dataclass(eq=False)
class Row:
    """One completion of a request, in a slot of its own.

    Attributes:
        job: Its request.
        key: Its name in the sampler.
        request: The request as the sampler is to see it.
        slot: Where its keys and values are.
        completion: What came of it so far.
        token_ids: Prompt and output.
        length: Tokens whose keys and values are in the slot.
        logprob: Of the output so far.
        held: What the client gets if this is one of the best.
    """

    job: Job
    key: int
    request: GenerationRequest
    slot: int
    completion: Completion
    token_ids: list[int]
    length: int = 0
    logprob: float = 0.0
    held: list[GenerationDelta] = field(default_factory=list)

    @property
    def is_decoding(self) -> bool:
        """Whether it has a token that the model has not seen yet, and goes on."""
        return len(self.job.request.prompt) <= self.length < len(self.token_ids) and (
            not self.has_ended
        )

    @property
    def has_ended(self) -> bool:
        """Whether its last token has come."""
        return self.completion.finish is not None

    @property
    def score(self) -> float:
        """Mean log probability of its tokens; none is worse than any."""
        count = self.completion.generated_tokens
        return self.logprob / count if count else -math.inf

    def common(self, other: Row) -> int:
        """Tokens that it begins with as the other one does, and whose keys and values it has."""
        ends = range(1, min(self.length, other.length) + 1)
        return bisect_left(
            ends, True, key=lambda end: self.token_ids[:end] != other.token_ids[:end]
        )


class Job:
    """A request from its submission to its last output.

    Args:
        request: The request.
        send: Takes the outputs, in the engine's thread.

    Attributes:
        rows: Its completions, from its turn on.
        cancelled: Set by other threads.
        cached: Tokens of the prompt that were found in the prefix cache.
        is_kept: Whether the prompt is in that cache, as far as it is to be.
        has_ended: Whether it had its last output.
    """

    def __init__(self, request: GenerationRequest, send: Callable[[Output], None]) -> None:
        self.request = request
        self.clock = Clock(request.arrived)
        self.rows: list[Row] = []
        self.cancelled = False
        self.cached = 0
        self.is_kept = False
        self.has_ended = False
        self._send = send
        self._position: int | None = None
        self._deadline = math.inf

    @property
    def generated_tokens(self) -> int:
        """Of all its completions, those that are not the best included; of beams only the best."""
        return sum(row.completion.generated_tokens for row in self.rows)

    @property
    def prompt_tokens(self) -> int:
        """Of the prompt, those that were computed or found by now."""
        size = len(self.request.prompt)
        if self.clock.first is not None:
            return size
        return min(self.rows[0].length, size) if self.rows else 0

    @property
    def is_late(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() >= self._deadline

    def begin(self, slots: tuple[int, ...], keys: Iterator[int], tokenizer: Tokenizer) -> None:
        """Its turn has come.

        Args:
            slots: One for each sequence that is computed for it.
            keys: For the sampler.
            tokenizer: For the completions.
        """
        request = self.request
        self.clock.turn = time.monotonic()
        if request.stopping.max_seconds is not None:
            self._deadline = self.clock.turn + request.stopping.max_seconds
        for index, slot in enumerate(slots):
            completion = Completion(request, tokenizer)
            row = Row(
                self,
                next(keys),
                self._sampled(index),
                slot,
                completion,
                list(request.prompt),
            )
            self.rows.append(row)
        started = GenerationStarted(
            request_id=request.request_id,
            prompt_tokens=len(request.prompt),
            seed=request.sampling.seed,
        )
        self._send(Output(key=request.key, started=started))

    def echo(self) -> None:
        """Begins the texts with the prompt, if that is wanted."""
        for index, row in enumerate(self.rows):
            self._show(index, row, row.completion.echo())

    def told(self, position: int) -> Output | None:
        """Its place in the queue for the client; None if that knows it."""
        if position == self._position:
            return None
        self._position = position
        return Output(key=self.request.key, queued=GenerationQueued(position=position))

    def tell_prompt(self, logprobs: list[TokenLogprob]) -> None:
        """Tells log probabilities of the prompt's next tokens."""
        told = PromptLogprobs(logprobs=logprobs)
        self._send(Output(key=self.request.key, prompt_logprobs=told))

    def push(self, row: Row, token: SampledToken) -> None:
        """Takes a completion's next token; its completion may end with it."""
        self.clock.token()
        row.token_ids.append(token.token_id)
        row.logprob += token.logprob or 0.0
        index = self.rows.index(row)
        self._show(index, row, row.completion.push(token))
        if not row.has_ended and self.is_late:
            self._show(index, row, row.completion.close(FinishReason.FINISH_REASON_TIME))

    def stop(self, reason: FinishReason.ValueType) -> None:
        """Ends the completions that go on."""
        for index, row in enumerate(self.rows):
            if not row.has_ended:
                self._show(index, row, row.completion.close(reason))

    def finish(self) -> None:
        """Sends the last output; every completion has ended."""
        best = self._best()
        for index, row in enumerate(best):
            for delta in row.held:
                delta.index = index
                self._send(Output(key=self.request.key, delta=delta))
        self._send(self._finished([row.completion.finish for row in best], self.generated_tokens))

    def unserved(self) -> Output:
        """The last output of a request that was cancelled before its turn."""
        finish = Finish(reason=FinishReason.FINISH_REASON_CANCELLED)
        return self._finished([finish] * self.request.n, generated=0)

    def fail(self, error: LoaderdError) -> None:
        """Sends an error as the last output."""
        self.has_ended = True
        self._send(Output(key=self.request.key, error=error_message(error)))

    def _best(self) -> list[Row]:
        """The completions that the client gets."""
        if self.request.best_of == self.request.n:
            return self.rows
        return sorted(self.rows, key=lambda row: -row.score)[: self.request.n]

    def _sampled(self, index: int) -> GenerationRequest:
        """The request for one completion: a seed of its own, and what ranking needs."""
        request = self.request
        if request.best_of == 1:
            return request
        seed = (request.sampling.seed + index) % _SEEDS
        ranked = request.best_of > request.n
        return replace(
            request,
            sampling=replace(request.sampling, seed=seed),
            top_logprobs=request.top_logprobs or 0 if ranked else request.top_logprobs,
        )

    def _show(self, index: int, row: Row, delta: GenerationDelta | None) -> None:
        if delta is None:
            return
        if self.request.best_of > self.request.n:
            row.held.append(delta)
            return
        delta.index = index
        self._send(Output(key=self.request.key, delta=delta))

    def _finished(self, finishes: list[Finish | None], generated: int) -> Output:
        self.has_ended = True
        finished = GenerationFinished(
            finishes=[finish for finish in finishes if finish],
            usage=Usage(
                prompt_tokens=len(self.request.prompt),
                cached_prompt_tokens=self.cached,
                generated_tokens=generated,
            ),
            timings=self.clock.timings(),
            seed=self.request.sampling.seed,
        )
        return Output(key=self.request.key, finished=finished)
