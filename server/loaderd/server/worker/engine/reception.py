"""Where requests come in and wait for their turn: what clients' threads and an engine's share."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable
from typing import TypeAlias

from loaderd.server.errors import InvalidArgumentError, QueueFullError
from loaderd.server.worker.engine.batching.beam_job import BeamJob
from loaderd.server.worker.engine.batching.job import Job
from loaderd.server.worker.engine.batching.scheduler import (
    UNBOUNDED,
    Capacity,
    Piece,
    Scheduler,
    Ticket,
)
from loaderd.server.worker.engine.protocol import Emit, GenerationRequest
from loaderd.server.worker.engine.reports import Reporter, Tally
from loaderd.worker.v1.worker_pb2 import EngineReport, Output

_TELL_SECONDS = 0.5

Admitted: TypeAlias = tuple[Job, tuple[int, ...]]
"""A request whose turn it is, and its slots."""


class Reception:
    """A scheduler that many threads may use, and the jobs that it speaks of by their keys.

    Args:
        capacity: What runs and waits at once.
        model_name: For errors.
        emit: Takes outputs of those that wait.
        send: Takes the outputs of those that run, in the engine's thread.
    """

    def __init__(
        self, capacity: Capacity, model_name: str, emit: Emit, send: Callable[[Output], None]
    ) -> None:
        self._capacity = capacity
        self._model_name = model_name
        self._emit = emit
        self._send = send
        self._scheduler = Scheduler(capacity)
        self._jobs: dict[int, Job] = {}
        self._told = -math.inf
        self._tally = Tally()
        self._reporter = Reporter(emit)
        self._closed = False
        self._changed = threading.Condition()

    @property
    def closed(self) -> bool:
        """Whether nothing more is served."""
        return self._closed

    def submit(self, request: GenerationRequest) -> None:
        """Queues a request.

        Raises:
            InvalidArgumentError: It needs more memory, or more slots, than there are.
            QueueFullError: Too many wait.
        """
        ticket = Ticket(
            key=request.key,
            client=request.client,
            priority=request.priority,
            arrived=request.arrived,
            prompt_tokens=len(request.prompt),
            new_tokens=request.stopping.max_new_tokens,
            completions=request.sequences,
        )
        self._check_completions(request)
        self._check_size(ticket)
        job = self._job(request)
        with self._changed:
            if not self._closed:
                if self._scheduler.is_full:
                    raise QueueFullError(self._model_name, self._capacity.queue)
                self._jobs[request.key] = job
                self._scheduler.submit(ticket)
                self._changed.notify()
                return
        self._emit([job.unserved()])

    def cancel(self, key: int) -> None:
        """Ends a request at once if it waits; else tells its job."""
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
        """Ends all that wait; what runs is left to the engine."""
        with self._changed:
            self._closed = True
            waiting = [key for key in self._jobs if self._scheduler.withdraw(key)]
            jobs = [self._jobs.pop(key) for key in waiting]
            self._changed.notify()
        if jobs:
            self._emit([job.unserved() for job in jobs])

    def admit(self, *, busy: bool, most: int | None = None) -> list[Admitted] | None:
        """Takes in those whose turn it is.

        Args:
            busy: Whether there is something to do meanwhile; else it waits for someone to come.
            most: At most so many; None for all that fit.

        Returns:
            None when it is closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or busy or self._scheduler.waiting)
            if self._closed:
                return None
            turns = itertools.islice(self._scheduler.admit(), most)
            return [(self._jobs[key], slots) for key, slots in turns]

    def tell_places(self) -> None:
        """Tells those who wait how many are before them, where that changed.

        Not at every call: there may be many who wait.
        """
        now = time.monotonic()
        with self._changed:
            if not self._scheduler.waiting or now < self._told + _TELL_SECONDS:
                return
            self._told = now
            told = (
                self._jobs[key].told(place) for place, key in enumerate(self._scheduler.order())
            )
            # At once, with the lock held: nothing may follow what cancels a request.
            if outputs := [output for output in told if output]:
                self._emit(outputs)

    def pieces(self, budget: int) -> list[Piece]:
        """See `Scheduler.pieces`."""
        with self._changed:
            return self._scheduler.pieces(budget)

    def computed(self, key: int, tokens: int) -> None:
        """See `Scheduler.computed`."""
        with self._changed:
            self._scheduler.computed(key, tokens)

    def move(self) -> tuple[int, int] | None:
        """See `Scheduler.move`."""
        with self._changed:
            return self._scheduler.move()

    def release(self, key: int, slot: int) -> None:
        """See `Scheduler.release`."""
        with self._changed:
            self._scheduler.release(key, slot)

    def end(self, key: int) -> None:
        """A request that ran has ended; its slots are free, as far as they are not already."""
        with self._changed:
            self._tally.end(self._jobs.pop(key))
            self._scheduler.end(key)

    def report(self) -> None:
        """Tells the daemon what the engine does, where that is due; in the engine's thread."""
        with self._changed:
            queued = self._scheduler.waiting
            running = len(self._jobs) - queued
            if not self._reporter.is_due(busy=running > 0):
                return
            report = EngineReport(running_requests=running, queued_requests=queued)
            if self._capacity.slot_tokens < UNBOUNDED:
                report.kv_tokens = self._scheduler.reserved_tokens
                report.kv_capacity_tokens = self._capacity.tokens
            self._tally.fill(report, self._jobs.values())
            self._reporter.send(report)

    def _job(self, request: GenerationRequest) -> Job:
        if request.beams:
            return BeamJob(request, self._send, request.beams)
        return Job(request, self._send)

    def _check_completions(self, request: GenerationRequest) -> None:
        if request.sequences > self._capacity.slots:
            if request.beams:
                field = "num_beams"
            else:
                field = "best_of" if request.best_of > request.n else "n"
            raise InvalidArgumentError(
                field, f"must be at most {self._capacity.slots}, as many as run at once"
            )

    def _check_size(self, ticket: Ticket) -> None:
        if not self._scheduler.can_ever_run(ticket):
            capacity = self._capacity
            raise InvalidArgumentError(
                "max_new_tokens",
                f"the prompt and {ticket.new_tokens} more for each of {ticket.completions} "
                f"completions need {ticket.tokens} tokens in memory; there is room for "
                f"{capacity.slot_tokens} each and {capacity.tokens} in all",
            )
