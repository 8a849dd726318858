"""The engine that serves all running requests in every forward pass."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from loaderd.server.errors import DeviceMemoryError, LoaderdError
from loaderd.server.worker import devices
from loaderd.server.worker.engine.batching.beam_job import BeamJob
from loaderd.server.worker.engine.batching.feed import Feed
from loaderd.server.worker.engine.batching.job import Job, Row
from loaderd.server.worker.engine.batching.memory import Memory
from loaderd.server.worker.engine.batching.pace import Pace
from loaderd.server.worker.engine.batching.runner import Runner
from loaderd.server.worker.engine.batching.sampler import (
    MOST_LOGPROBS,
    BatchSampler,
    prompt_logprobs,
)
from loaderd.server.worker.engine.batching.scheduler import Capacity, Piece
from loaderd.server.worker.engine.batching.transfer import sent
from loaderd.server.worker.engine.completion import Tokenizer
from loaderd.server.worker.engine.protocol import Emit, GenerationRequest, SampledToken
from loaderd.server.worker.engine.reception import Reception
from loaderd.server.worker.engine.supported import HONOURED
from loaderd.server.worker.failures import incident
from loaderd.v1.generation_pb2 import FinishReason
from loaderd.worker.v1.worker_pb2 import Output

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 5.0


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
    supported_parameters = HONOURED

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
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._emit = emit
        self._on_death = on_death
        self._outputs: list[Output] = []
        self._reception = Reception(capacity, model_name, emit, self._outputs.append)
        self._pace = Pace()
        self._running: dict[int, Job] = {}
        self._row_keys = itertools.count()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> None:
        """Queues a request.

        Raises:
            InvalidArgumentError: It needs more memory than the engine has.
            QueueFullError: Too many wait.
        """
        self._reception.submit(request)

    def cancel(self, key: int) -> None:
        """Ends a request: at once if it waits, else at the end of the step."""
        self._reception.cancel(key)

    def close(self) -> None:
        """Cancels all requests and ends the engine's thread."""
        self._reception.close()
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                self._reception.report()
                while self._admit():
                    self._reception.report()
                    self._step()
                    self._emit_outputs()
                    self._reception.report()
                for job in list(self._running.values()):
                    self._stop(job, FinishReason.FINISH_REASON_CANCELLED)
                self._emit_outputs()
        except BaseException:
            # A process whose engine is dead must not look alive: the daemon tells all clients.
            logger.critical("the engine failed; the worker ends", exc_info=True)
            self._on_death()

    def _admit(self) -> bool:
        """Waits for something to do and takes in whose turn it is; false when it is over."""
        admitted = self._reception.admit(busy=bool(self._running))
        if admitted is None:
            return False
        self._reception.tell_places()
        for job, slots in admitted:
            self._running[job.request.key] = job
            with self._failing(job, "starting"):
                job.begin(slots, self._row_keys, self._tokenizer)
                for row in job.rows:
                    self._memory.reserve(row)
                    if not isinstance(job, BeamJob):
                        self._sampler.admit(row.key, row.request)
        return True

    def _step(self) -> None:
        begin = time.monotonic()
        work = self._plan()
        if not work:
            return  # what was to be computed has failed already
        prompt_tokens = sum(len(one.feed.token_ids) for one in work if one.is_prompt)
        decoding = sum(not one.is_prompt for one in work)
        done, logits = self._compute(work)
        self._advance(done, logits)
        self._pace.note(decoding, prompt_tokens, time.monotonic() - begin)
        for job in list(self._running.values()):
            if job.cancelled:
                self._stop(job, FinishReason.FINISH_REASON_CANCELLED)
            elif job.is_late:
                self._stop(job, FinishReason.FINISH_REASON_TIME)
        self._close_a_hole()

    def _plan(self) -> list[_Work]:
        rows = [row for job in self._running.values() for row in job.rows if row.is_decoding]
        work = [
            _Work(row.job, row, Feed(row.slot, row.length, row.token_ids[-1:], wants=1))
            for row in rows
        ]
        prompts = len(self._running) - len({row.job for row in rows})
        budget = self._pace.budget(len(rows), prompts)
        for piece in self._reception.pieces(budget):
            job = self._running[piece.key]
            with self._failing(job, "starting"):
                work.append(self._prompt_work(job, piece))
        return work

    def _prompt_work(self, job: Job, piece: Piece) -> _Work:
        row, prompt = job.rows[0], job.request.prompt
        if not row.length:
            self._memory.take_prefix(row)
        end = min(row.length + piece.count, len(prompt))
        wants = int(end == len(prompt))
        if job.request.prompt_logprobs is not None:
            end = min(end, row.length + MOST_LOGPROBS)
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
                self._fail(work[0].job, error, "generating")
                return [], torch.empty(0)
            logger.warning("a step of %d requests failed; trying each alone", len(work))
        parts = [self._compute([one]) for one in work if not one.job.has_ended]
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
            targets = [] if one.is_prompt else [one.row]
            if one.is_prompt:
                with self._failing(one.job, "taking the prompt"):
                    self._tell_prompt(one, logits[place - one.feed.wants : place])
                    targets = self._advance_prompt(one)
            rows += targets
            places += [place - 1] * len(targets)
        if rows:
            if places != list(range(len(logits))):
                logits = logits.index_select(0, sent(torch.tensor(places), logits.device))
            self._choose(logits, rows)

    def _advance_prompt(self, one: _Work) -> list[Row]:
        """Gives the rows that go on from here: all of the request when its prompt is computed."""
        self._reception.computed(one.job.request.key, one.end)
        if one.end < len(one.job.request.prompt):
            return []
        if isinstance(one.job, BeamJob):
            return one.job.beams
        self._memory.fork(one.row)
        one.job.echo()
        return one.job.rows

    def _tell_prompt(self, one: _Work, logits: torch.Tensor) -> None:
        top, prompt = one.job.request.prompt_logprobs, one.job.request.prompt
        following = prompt[one.feed.begin + 1 : one.end + 1]
        if top is not None and following:
            tokens = prompt_logprobs(logits[: len(following)], following, top)
            one.job.tell_prompt(self._tokenizer.logprobs(tokens))

    def _choose(self, logits: torch.Tensor, rows: list[Row]) -> None:
        """Chooses what each row goes on with: a beam among all of its job, others by themselves."""
        for job in dict.fromkeys(row.job for row in rows):
            if isinstance(job, BeamJob):
                self._search(job, logits[[rows.index(row) for row in job.beams]])
        places = [place for place, row in enumerate(rows) if not isinstance(row.job, BeamJob)]
        if len(places) == len(rows):
            self._sample(logits, rows)
        elif places:
            self._sample(logits[places], [rows[place] for place in places])

    def _search(self, job: BeamJob, logits: torch.Tensor) -> None:
        with self._failing(job, "searching"):
            chosen = job.advance(logits)
            self._keep_prompt(job.rows[0])
            job.place(chosen, self._memory.follow)
            if all(row.has_ended for row in job.rows):
                for row in job.rows:
                    self._retire(row)
                self._finish(job)

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
            with self._failing(row.job, "taking a token"):
                self._take(row, outcome)

    def _take(self, row: Row, outcome: SampledToken | LoaderdError) -> None:
        if isinstance(outcome, LoaderdError):
            raise outcome
        row.job.push(row, outcome)
        self._keep_prompt(row)
        if row.has_ended:
            self._memory.keep_prefix(row)
            self._retire(row)
            if all(other.has_ended for other in row.job.rows):
                self._finish(row.job)

    def _keep_prompt(self, row: Row) -> None:
        """Keeps a prompt for others, once a token has come of it: else it may hold no numbers."""
        if not row.job.is_kept:
            row.job.is_kept = True
            self._memory.keep_prefix(row)

    def _retire(self, row: Row) -> None:
        """Frees what an ended completion holds."""
        self._sampler.retire(row.key)
        self._memory.free(row)
        self._reception.release(row.job.request.key, row.slot)

    def _finish(self, job: Job) -> None:
        job.finish()
        self._forget(job)
        logger.info(
            "request %s: %d prompt tokens, %d cached, %d generated",
            job.request.request_id,
            len(job.request.prompt),
            job.cached,
            job.generated_tokens,
            extra=job.request.log_fields,
        )

    def _stop(self, job: Job, reason: FinishReason.ValueType) -> None:
        """Ends what goes on of a request."""
        live = [row for row in job.rows if not row.has_ended]
        with self._failing(job, "ending"):
            job.stop(reason)
            for row in live:
                self._memory.wipe(row)  # nobody has looked yet at what a prompt's begin brought
                self._retire(row)
            self._finish(job)

    @contextmanager
    def _failing(self, job: Job, doing: str) -> Iterator[None]:
        """What fails in it fails its request and no other."""
        try:
            yield
        except Exception as error:
            self._fail(job, error, doing)

    def _fail(self, job: Job, error: Exception, doing: str) -> None:
        """Ends a request with an error, unless it has ended.

        Raises:
            Exception: `error`, if the device is broken.
        """
        if devices.is_broken(error):
            raise error
        if job.has_ended:
            logger.error("%s for request %s", doing, job.request.request_id, exc_info=error)
            return
        if isinstance(error, LoaderdError):
            self._end(job, error)
            return
        request_id = job.request.request_id
        failure: LoaderdError
        if devices.is_out_of_memory(error):
            logger.warning("request %s: out of memory", request_id, extra=job.request.log_fields)
            failure = DeviceMemoryError(self._model_name)
        else:
            failure = incident(error, f"{doing} for request {request_id}")
        self._end(job, failure)
        error.__traceback__ = None  # its frames hold what the step had computed
        devices.release_cached_memory()

    def _end(self, job: Job, failure: LoaderdError) -> None:
        for row in job.rows:
            self._sampler.retire(row.key)
            if not row.has_ended:  # else its slot may be another's by now
                self._memory.wipe(row)
                self._memory.free(row)
        self._forget(job)
        job.fail(failure)

    def _forget(self, job: Job) -> None:
        self._reception.end(job.request.key)
        del self._running[job.request.key]

    def _close_a_hole(self) -> None:
        move = self._reception.move()
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
