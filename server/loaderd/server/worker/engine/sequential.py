"""The engine for every causal language model: transformers' `generate`, one request at a time."""

from __future__ import annotations

import inspect
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from loaderd.server.errors import DeviceMemoryError, LoaderdError
from loaderd.server.worker import devices
from loaderd.server.worker.engine.batching.sampler import BatchSampler
from loaderd.server.worker.engine.clock import Clock
from loaderd.server.worker.engine.completion import Completion, Tokenizer
from loaderd.server.worker.engine.protocol import Emit, GenerationRequest, SampledToken
from loaderd.server.worker.engine.supported import ALONE
from loaderd.server.worker.failures import error_message, incident
from loaderd.v1.generation_pb2 import (
    Finish,
    FinishReason,
    GenerationDelta,
    GenerationFinished,
    GenerationStarted,
    Usage,
)
from loaderd.worker.v1.worker_pb2 import Output

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 5.0

_PLAIN_DECODING: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "return_dict_in_generate": False,
    "max_time": None,
    "stop_strings": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "cache_implementation": None,
    # The sampler does these.
    "do_sample": False,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
}
"""Against a model's own generation config that wants another mode of decoding, or a limit."""


class _Chooser(LogitsProcessor):  # type: ignore[misc]  # transformers has no types here
    """Makes `generate` go on with the token that the sampler chooses.

    So the engines choose alike: a request with a seed gets the same tokens from each.

    Attributes:
        chosen: The last one.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self.chosen = SampledToken(-1)
        self._sampler = BatchSampler()
        self._sampler.admit(request.key, request)
        self._key = request.key

    def __call__(self, _input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Leaves one token that may come.

        Raises:
            LoaderdError: None may.
        """
        (outcome,) = self._sampler.sample(scores.float(), [self._key])
        if isinstance(outcome, LoaderdError):
            raise outcome
        self.chosen = outcome
        only = torch.full_like(scores, -math.inf)
        only[0, outcome.token_id] = 0
        return only


@dataclass
class _Job:
    """A request that waits or runs."""

    request: GenerationRequest
    clock: Clock
    cancelled: threading.Event = field(default_factory=threading.Event)


class SequentialEngine:
    """Serves requests in the order of their arrival, each alone.

    Args:
        model: Any model with `generate`.
        tokenizer: Its tokenizer's part that completions need.
        model_name: For errors.
        emit: Takes the outputs, from the engine's thread and from those that call it.
        on_death: Called when the engine can serve no more, such as with a broken accelerator.
    """

    name = "sequential"
    supported_parameters = ALONE

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        model_name: str,
        emit: Emit,
        on_death: Callable[[], None],
    ) -> None:
        self._model = model
        self._takes_mask = "attention_mask" in inspect.signature(model.forward).parameters
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._emit = emit
        self._on_death = on_death
        self._waiting: deque[_Job] = deque()
        self._running: _Job | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> None:
        """Queues a request."""
        job = _Job(request, Clock(request.arrived))
        with self._changed:
            if not self._closed:
                self._waiting.append(job)
                self._changed.notify()
                return
        self._end_unserved(job)

    def cancel(self, key: int) -> None:
        """Ends a request before its next token."""
        with self._changed:
            if self._running is not None and self._running.request.key == key:
                self._running.cancelled.set()
            found = [job for job in self._waiting if job.request.key == key]
            for job in found:
                self._waiting.remove(job)
        for job in found:
            self._end_unserved(job)

    def close(self) -> None:
        """Cancels all requests and ends the engine's thread."""
        with self._changed:
            self._closed = True
            left = list(self._waiting)
            self._waiting.clear()
            if self._running is not None:
                self._running.cancelled.set()
            self._changed.notify()
        for job in left:
            self._end_unserved(job)
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            while (job := self._next()) is not None:
                failure = self._serve(job)
                if failure is not None:
                    self._output(job, error=error_message(failure))
                    devices.release_cached_memory()
        except BaseException:
            # A process whose engine is dead must not look alive: the daemon tells all clients.
            logger.critical("the engine failed; the worker ends", exc_info=True)
            self._on_death()

    def _next(self) -> _Job | None:
        with self._changed:
            self._running = None
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            self._running = self._waiting.popleft()
            return self._running

    def _serve(self, job: _Job) -> LoaderdError | None:
        """Generates up to the last output; gives the error that takes its place, if any."""
        request = job.request
        job.clock.turn = time.monotonic()
        try:
            completion = Completion(request, self._tokenizer)
            self._start(job)
            self._show(job, completion.echo())
            self._generate(job, completion)
            if completion.finish is None:
                self._show(job, completion.close(FinishReason.FINISH_REASON_LENGTH))
        except LoaderdError as error:
            return error
        except Exception as error:
            if devices.is_out_of_memory(error):
                logger.warning("request %s: out of memory", request.request_id)
                return DeviceMemoryError(self._model_name)
            if devices.is_broken(error):
                raise
            return incident(error, f"generating for request {request.request_id}")
        self._finish(job, completion.finish, completion.generated_tokens)
        return None

    def _generate(self, job: _Job, completion: Completion) -> None:
        request, clock, chooser = job.request, job.clock, _Chooser(job.request)
        seconds = request.stopping.max_seconds
        deadline = time.monotonic() + (math.inf if seconds is None else seconds)

        # A stopping criterion sees each token before the next one is computed; a streamer gets
        # it after the decision to go on.
        def take(input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
            if completion.finish is None:
                clock.token()
                self._show(job, completion.push(chooser.chosen))
            if completion.finish is None and job.cancelled.is_set():
                self._show(job, completion.close(FinishReason.FINISH_REASON_CANCELLED))
            if completion.finish is None and time.monotonic() >= deadline:
                self._show(job, completion.close(FinishReason.FINISH_REASON_TIME))
            return torch.full((1,), completion.finish is not None, device=input_ids.device)

        prompt = torch.tensor([request.prompt], device=self._model.device)
        mask = {"attention_mask": torch.ones_like(prompt)} if self._takes_mask else {}
        with torch.inference_mode():
            self._model.generate(
                prompt,
                logits_processor=LogitsProcessorList([chooser]),
                stopping_criteria=StoppingCriteriaList([take]),
                **mask,
                **_arguments(request),
            )

    def _start(self, job: _Job) -> None:
        started = GenerationStarted(
            request_id=job.request.request_id,
            prompt_tokens=len(job.request.prompt),
            seed=job.request.sampling.seed,
        )
        self._output(job, started=started)

    def _show(self, job: _Job, delta: GenerationDelta | None) -> None:
        if delta is not None:
            self._output(job, delta=delta)

    def _finish(self, job: _Job, finish: Finish | None, generated: int) -> None:
        finished = GenerationFinished(
            finishes=[finish] if finish else [],
            usage=Usage(prompt_tokens=len(job.request.prompt), generated_tokens=generated),
            timings=job.clock.timings(),
            seed=job.request.sampling.seed,
        )
        self._output(job, finished=finished)
        logger.info(
            "request %s: %d prompt tokens, %d generated",
            job.request.request_id,
            len(job.request.prompt),
            generated,
        )

    def _end_unserved(self, job: _Job) -> None:
        self._finish(job, Finish(reason=FinishReason.FINISH_REASON_CANCELLED), generated=0)

    def _output(self, job: _Job, **event: Any) -> None:
        self._emit([Output(key=job.request.key, **event)])


def _arguments(request: GenerationRequest) -> dict[str, Any]:
    """The request in terms of `generate`; what it leaves out is the model's own default."""
    return _PLAIN_DECODING | {
        "max_new_tokens": request.stopping.max_new_tokens,
        "eos_token_id": list(request.stopping.eos_token_ids) or None,
        # Never used, for nothing is padded; unset, it draws a warning.
        "pad_token_id": 0,
    }
