"""The engine that serves all running requests in every forward pass."""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from loaderd.server.errors import (
    DeviceMemoryError,
    InvalidArgumentError,
    LoaderdError,
    QueueFullError,
)
from loaderd.server.worker import devices
from loaderd.server.worker.engine.batching.job import Job, Row
from loaderd.server.worker.engine.batching.memory import Memory
from loaderd.server.worker.engine.batching.pace import Pace
from loaderd.server.worker.engine.batching.runner import Feed, Runner
from loaderd.server.worker.engine.batching.sampler import BatchSampler, prompt_logprobs
from loaderd.server.worker.engine.batching.scheduler import Capacity, Piece, Scheduler, Ticket
from loaderd.server.worker.engine.completion import Tokenizer
from loaderd.server.worker.engine.protocol import Emit, GenerationRequest
from loaderd.server.worker.engine.supported import BATCHED
from loaderd.server.worker.failures import incident
from loaderd.worker.v1.worker_pb2 import Output

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 5.0
_TELL_SECONDS = 0.5
_MOST_LOGPROBS = 64
"""Prompt tokens of one request whose logits, each as long as the vocabulary, are made at once."""


@dataclass(frozen=True, slots=True)
class _Work:
    """What a request computes in a step: one row's token, or a piece of its prompt."""

    job: Job
    row: Row
    feed: Feed

    @property
    def is_prompt(self) -> bool:
        return self.feed.begin < len(self.job.request.prompt)

    @property
    def end(self) -> int:
        return self.feed.begin + len(self.feed.token_ids)


class BatchingEngine:
    """Continuous batching: requests join and leave between any two steps.

    Args:
        runner: Runs the model.
        memory: What its slots hold.
        sampler: Chooses tokens.
        capacity: Of that memory, and how many may wait.
        tokenizer: The part of the model's tokenizer that completions need.
        model_name: For errors.
        emit: Takes the outputs of each step, from the engine's thread and from those that call it.
        on_death: Called when the engine can serve no more, such as with a broken accelerator.
    """

    name = "batching"
    supported_parameters = BATCHED

    def __init__(
        self,
        *,
        runner: Runner,
        memory: Memory,
        sampler: BatchSampler,
        capacity: Capacity,
        tokenizer: Tokenizer,
        model_name: str,
        emit: Emit,
        on_death: Callable[[], None],
    ) -> None:
        self._runner = runner
        self._memory = memory
        self._sampler = sampler
        self._capacity = capacity
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._emit = emit
        self._on_death = on_death
        self._scheduler = Scheduler(capacity)
        self._pace = Pace()
        self._jobs: dict[int, Job] = {}
        self._running: dict[int, Job] = {}
        self._outputs: list[Output] = []
        self._row_keys = itertools.count()
        self._told = -math.inf
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> None:
        """Queues a request.

        Raises:
            InvalidArgumentError: It needs more memory than the engine has.
            QueueFullError: Too many wait.
        """
        ticket = Ticket(
            key=request.key,
            client=request.client,
            priority=request.priority,
            arrived=request.arrived,
            prompt_tokens=len(request.prompt),
            new_tokens=request.stopping.max_new_tokens,
            completions=request.best_of,
        )
        self._check_size(ticket)
        with self._changed:
            if not self._closed:
                if self._scheduler.is_full:
                    raise QueueFullError(self._model_name, self._capacity.queue)
                self._jobs[request.key] = Job(request, self._outputs.append)
                self._scheduler.submit(ticket)
                self._changed.notify()
                return
        self._emit([Job(request, self._outputs.append).unserved()])

    def cancel(self, key: int) -> None:
        """Ends a request: at once if it waits, else at the end of the step."""
        with self._changed:
            job = self._jobs.get(key)
            if job is None:
                return
            job.cancelled = True
            if not self._scheduler.withdraw(key):
                return
            del self._jobs[key]
        self._emit([job.unserved()])

    def close(self) -> None:
        """Cancels all requests and ends the engine's thread."""
        with self._changed:
            self._closed = True
            waiting = [key for key in self._jobs if self._scheduler.withdraw(key)]
            jobs = [self._jobs.pop(key) for key in waiting]
            self._changed.notify()
        if jobs:
            self._emit([job.unserved() for job in jobs])
        self._thread.join(_CLOSE_SECONDS)

    def _check_size(self, ticket: Ticket) -> None:
        if not self._scheduler.can_ever_run(ticket):
            capacity = self._capacity
            raise InvalidArgumentError(
                "max_new_tokens",
                f"the prompt and {ticket.new_tokens} more for each of {ticket.completions} "
                f"completions need {ticket.tokens} tokens in memory; there is room for "
                f"{capacity.slot_tokens} each and {capacity.tokens} in all",
            )

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._admit():
                    self._step()
                    self._emit_outputs()
                for job in list(self._running.values()):
                    self._cancel(job)
                self._emit_outputs()
        except BaseException:
            # A process whose engine is dead must not look alive: the daemon tells all clients.
            logger.critical("the engine failed; the worker ends", exc_info=True)
            self._on_death()

    def _admit(self) -> bool:
        """Waits for something to do and takes in whose turn it is; false when it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._running or self._scheduler.waiting)
            if self._closed:
                return False
            admitted = [(self._jobs[key], slots) for key, slots in self._scheduler.admit()]
            self._tell_positions()
        for job, slots in admitted:
            self._running[job.request.key] = job
            try:
                job.begin(slots, self._row_keys, self._tokenizer)
                for row in job.rows:
                    self._sampler.admit(row.key, row.request)
            except Exception as error:
                self._fail(job, error, "starting")
        return True

    def _tell_positions(self) -> None:
        """Not at every step: there may be many who wait."""
        now = time.monotonic()
        if self._scheduler.waiting and now >= self._told + _TELL_SECONDS:
            self._told = now
            told = (
                self._jobs[key].told(place) for place, key in enumerate(self._scheduler.order())
            )
            # At once, with the lock held: nothing may follow what cancels a request.
            if outputs := [output for output in told if output]:
                self._emit(outputs)

    def _step(self) -> None:
        begin = time.monotonic()
        work = self._plan()
        prompt_tokens = sum(len(one.feed.token_ids) for one in work if one.is_prompt)
        decoding = sum(not one.is_prompt for one in work)
        done, logits = self._compute(work)
        self._advance(done, logits)
        self._pace.note(decoding, prompt_tokens, time.monotonic() - begin)
        for job in list(self._running.values()):
            if job.cancelled:
                self._cancel(job)
        self._close_a_hole()

    def _plan(self) -> list[_Work]:
        rows = [row for job in self._running.values() for row in job.rows if row.is_decoding]
        work = [
            _Work(row.job, row, Feed(row.slot, row.length, row.token_ids[-1:], wants=1))
            for row in rows
        ]
        with self._changed:
            pieces = self._scheduler.pieces(self._pace.budget(len(rows)))
        return work + [self._prompt_work(piece) for piece in pieces]

    def _prompt_work(self, piece: Piece) -> _Work:
        job = self._running[piece.key]
        row, prompt = job.rows[0], job.request.prompt
        if not row.length:
            self._memory.take_prefix(row)
        end = min(row.length + piece.count, len(prompt))
        wants = int(end == len(prompt))
        if job.request.prompt_logprobs is not None:
            end = min(end, row.length + _MOST_LOGPROBS)
            wants = end - row.length
        return _Work(job, row, Feed(row.slot, row.length, prompt[row.length : end], wants))

    def _compute(self, work: list[_Work]) -> tuple[list[_Work], torch.Tensor]:
        """Runs the model; what fails together is tried one by one, so that no more fail than must.

        Returns:
            The work that succeeded, and its logits.
        """
        try:
            return work, self._runner.run([one.feed for one in work])
        except Exception as error:
            if devices.is_broken(error):
                raise
            if len(work) == 1:
                if not work[0].job.has_ended:
                    self._fail(work[0].job, error, "generating")
                return [], torch.empty(0)
            logger.warning("a step of %d requests failed; trying each alone", len(work))
        parts = [self._compute([one]) for one in work]
        tensors = [logits for done, logits in parts if done]
        return [one for done, _ in parts for one in done], torch.cat(tensors or [torch.empty(0)])

    def _advance(self, done: list[_Work], logits: torch.Tensor) -> None:
        """Takes the results of the model: the last logits of each that has its whole prompt."""
        rows: list[Row] = []
        places: list[int] = []
        place = 0
        for one in done:
            place += one.feed.wants
            if one.job.has_ended:
                continue
            one.row.length = one.end
            targets = [one.row]
            if one.is_prompt:
                self._tell_prompt(one, logits[place - one.feed.wants : place])
                targets = self._advance_prompt(one)
            rows += targets
            places += [place - 1] * len(targets)
        if rows:
            if places != list(range(len(logits))):
                logits = logits[places]
            self._sample(logits, rows)

    def _advance_prompt(self, one: _Work) -> list[Row]:
        """Gives the rows that go on from here: all of the request when its prompt is computed."""
        with self._changed:
            self._scheduler.computed(one.job.request.key, one.end)
        if one.end < len(one.job.request.prompt):
            return []
        self._memory.keep_prefix(one.row)
        self._memory.fork(one.row)
        one.job.echo()
        return one.job.rows

    def _tell_prompt(self, one: _Work, logits: torch.Tensor) -> None:
        top, prompt = one.job.request.prompt_logprobs, one.job.request.prompt
        following = prompt[one.feed.begin + 1 : one.end + 1]
        if top is not None and following:
            tokens = prompt_logprobs(logits[: len(following)], following, top)
            one.job.tell_prompt(self._tokenizer.logprobs(tokens))

    def _sample(self, logits: torch.Tensor, rows: list[Row]) -> None:
        try:
            outcomes = self._sampler.sample(logits, [row.key for row in rows])
        except Exception as error:
            for job in {row.job for row in rows}:
                self._fail(job, error, "sampling")
            return
        for row, outcome in zip(rows, outcomes, strict=True):
            if row.job.has_ended:
                continue
            if isinstance(outcome, LoaderdError):
                self._end(row.job, outcome)
                continue
            try:
                row.job.push(row, outcome)
            except Exception as error:
                self._fail(row.job, error, "decoding text")
                continue
            if row.has_ended:
                self._memory.keep_prefix(row)
                self._retire(row)
                if all(other.has_ended for other in row.job.rows):
                    self._finish(row.job)

    def _retire(self, row: Row) -> None:
        """Frees what an ended completion holds."""
        self._sampler.retire(row.key)
        self._memory.free(row)
        with self._changed:
            self._scheduler.release(row.job.request.key, row.slot)

    def _finish(self, job: Job) -> None:
        self._forget(job)
        job.finish()
        logger.info(
            "request %s: %d prompt tokens, %d cached, %d generated",
            job.request.request_id,
            len(job.request.prompt),
            job.cached,
            sum(row.completion.generated_tokens for row in job.rows),
        )

    def _cancel(self, job: Job) -> None:
        live = [row for row in job.rows if not row.has_ended]
        job.cancel()
        for row in live:
            self._retire(row)
        self._finish(job)

    def _fail(self, job: Job, error: Exception, doing: str) -> None:
        """Ends a request with an error.

        Raises:
            Exception: `error`, if the device is broken.
        """
        if devices.is_broken(error):
            raise error
        request_id = job.request.request_id
        failure: LoaderdError
        if devices.is_out_of_memory(error):
            logger.warning("request %s: out of memory", request_id)
            failure = DeviceMemoryError(self._model_name)
        else:
            failure = incident(error, f"{doing} for request {request_id}")
        self._end(job, failure)
        devices.release_cached_memory()

    def _end(self, job: Job, failure: LoaderdError) -> None:
        for row in job.rows:
            self._sampler.retire(row.key)
            self._memory.free(row)
        with self._changed:
            self._scheduler.end(job.request.key)
        self._forget(job)
        job.fail(failure)

    def _forget(self, job: Job) -> None:
        with self._changed:
            del self._jobs[job.request.key]
        del self._running[job.request.key]

    def _close_a_hole(self) -> None:
        with self._changed:
            move = self._scheduler.move()
        if move is None:
            return
        source, target = move
        rows = [row for job in self._running.values() for row in job.rows]
        row = next(row for row in rows if row.slot == source and not row.has_ended)
        self._memory.move(row, target)

    def _emit_outputs(self) -> None:
        if self._outputs:
            self._emit(list(self._outputs))
            self._outputs.clear()
