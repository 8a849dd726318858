"""The engine for every causal language model: transformers' `generate`, one request at a time."""

from __future__ import annotations

import inspect
import itertools
import logging
import math
import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from loaderd.server.errors import DeviceMemoryError, LoaderdError
from loaderd.server.worker import devices
from loaderd.server.worker.engine.batching.beam_job import BeamJob
from loaderd.server.worker.engine.batching.job import Job, Row
from loaderd.server.worker.engine.batching.sampler import (
    MOST_LOGPROBS,
    BatchSampler,
    prompt_logprobs,
)
from loaderd.server.worker.engine.batching.scheduler import UNBOUNDED, Capacity
from loaderd.server.worker.engine.completion import Tokenizer
from loaderd.server.worker.engine.parameters import MAX_COMPLETIONS
from loaderd.server.worker.engine.protocol import Emit, GenerationRequest
from loaderd.server.worker.engine.reception import Admitted, Reception
from loaderd.server.worker.engine.supported import HONOURED
from loaderd.server.worker.failures import incident
from loaderd.server.worker.layers import input_device
from loaderd.v1.generation_pb2 import FinishReason
from loaderd.worker.v1.worker_pb2 import Output

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 5.0
_MAX_QUEUE = 1024

# Greedy, for the choosers do the rest. Nothing is padded, but an unset id draws a warning.
_PLAIN_DECODING: dict[str, Any] = {"do_sample": False, "use_cache": True, "pad_token_id": 0}


class _Chooser(Protocol):
    """Makes `generate` go on with what the engines' common code chooses.

    So the engines choose alike: a request with a seed gets the same tokens from each.
    """

    @property
    def has_ended(self) -> bool:
        """Whether the last token has come."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Takes the next token, and leaves what `generate` is to choose.

        Raises:
            LoaderdError: It cannot go on.
        """


class _TokenChooser(LogitsProcessor):  # type: ignore[misc]  # transformers has no types here
    """Of one completion; see `_Chooser`."""

    def __init__(self, job: Job, row: Row) -> None:
        self._job = job
        self._row = row
        self._sampler = BatchSampler()
        self._sampler.admit(row.key, row.request)

    @property
    def has_ended(self) -> bool:
        return self._row.has_ended

    def __call__(self, _input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        (outcome,) = self._sampler.sample(scores.float(), [self._row.key])
        if isinstance(outcome, LoaderdError):
            raise outcome
        self._job.push(self._row, outcome)
        only = torch.full_like(scores, -math.inf)
        only[0, outcome.token_id] = 0
        return only


class _BeamChooser(LogitsProcessor):  # type: ignore[misc]  # transformers has no types here
    """Of a beam search; see `_Chooser`.

    `generate` keeps a beam's score, adds what this gives and takes the best sums. They are made to
    be the new beams' places, negated: so it takes these and no others, in their order.
    """

    def __init__(self, job: BeamJob) -> None:
        self._job = job
        self._running = 1  # Before the first step all of its rows are the prompt.

    @property
    def has_ended(self) -> bool:
        return all(row.has_ended for row in self._job.rows)

    def __call__(self, _input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = self._job.advance(scores[: self._running])
        self._running = len(chosen)
        only = torch.full_like(scores, -math.inf)
        for place, candidate in enumerate(chosen):
            only[candidate.parent, candidate.token_id] = candidate.parent - place
        return only


class SequentialEngine:
    """Serves requests one after the other, and the completions of each one alike.

    Args:
        model: Any model with `generate`; it loses its generation config.
        tokenizer: Its tokenizer's part that completions need.
        model_name: For errors.
        emit: Takes the outputs, from the engine's thread and from those that call it.
        on_death: Called when the engine can serve no more, such as with a broken accelerator.
    """

    name = "sequential"
    supported_parameters = HONOURED

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        model_name: str,
        emit: Emit,
        on_death: Callable[[], None],
    ) -> None:
        # `generate` fills up what it is given from the model's own one, of which nothing may act.
        model.generation_config = GenerationConfig()
        self._model = model
        self._takes = frozenset(inspect.signature(model.forward).parameters)
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._on_death = on_death
        self._emit = emit
        self._outputs: list[Output] = []
        self._reception = Reception(
            Capacity(MAX_COMPLETIONS, UNBOUNDED, MAX_COMPLETIONS * UNBOUNDED, _MAX_QUEUE),
            model_name,
            emit,
            send=self._outputs.append,
        )
        self._row_keys = itertools.count()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> None:
        """Queues a request.

        Raises:
            QueueFullError: Too many wait.
        """
        self._reception.submit(request)

    def cancel(self, key: int) -> None:
        """Ends a request before its next token."""
        self._reception.cancel(key)

    def close(self) -> None:
        """Cancels all requests and ends the engine's thread."""
        self._reception.close()
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            self._reception.report()
            while (admitted := self._reception.admit(busy=False, most=1)) is not None:
                self._reception.report()
                for turn in admitted:
                    self._serve(turn)
                self._reception.report()
        except BaseException:
            # A process whose engine is dead must not look alive: the daemon tells all clients.
            logger.critical("the engine failed; the worker ends", exc_info=True)
            self._on_death()

    def _serve(self, turn: Admitted) -> None:
        """Generates up to the last output."""
        job, _ = turn
        failure = self._failure(turn)
        self._reception.end(job.request.key)
        if failure is not None:
            job.fail(failure)
            self._emit_outputs()
            devices.release_cached_memory()
            return
        job.finish()
        self._emit_outputs()
        logger.info(
            "request %s: %d prompt tokens, %d generated",
            job.request.request_id,
            len(job.request.prompt),
            job.generated_tokens,
            extra=job.request.log_fields,
        )

    def _failure(self, turn: Admitted) -> LoaderdError | None:
        """Generates all completions; gives the error that takes their place, if any."""
        job, slots = turn
        try:
            job.begin(slots, self._row_keys, self._tokenizer)
            self._emit_outputs()
            with torch.inference_mode():
                self._generate_all(job)
        except LoaderdError as error:
            return error
        except Exception as error:
            request_id = job.request.request_id
            if devices.is_out_of_memory(error):
                logger.warning(
                    "request %s: out of memory", request_id, extra=job.request.log_fields
                )
                return DeviceMemoryError(self._model_name)
            if devices.is_broken(error):
                raise
            return incident(error, f"generating for request {request_id}")
        return None

    def _generate_all(self, job: Job) -> None:
        prompt = torch.tensor([job.request.prompt], device=input_device(self._model))
        mask = (
            {"attention_mask": torch.ones_like(prompt)} if "attention_mask" in self._takes else {}
        )
        if job.request.prompt_logprobs is not None:
            self._tell_prompt(job, self._model(prompt, **mask).logits[0])
        job.echo()
        self._emit_outputs()
        if isinstance(job, BeamJob):
            beams = {"num_beams": len(job.rows), "use_cache": self._can_reorder}
            self._generate(job, _BeamChooser(job), prompt, mask, **beams)
            return
        for place, row in enumerate(job.rows):
            if place and job.is_late:
                job.stop(FinishReason.FINISH_REASON_TIME)
            if not row.has_ended:
                self._generate(job, _TokenChooser(job, row), prompt, mask)

    @cached_property
    def _can_reorder(self) -> bool:
        """Whether what the model keeps of the tokens before can follow beams that change places.

        Where it cannot, all tokens of a beam are computed in every step.
        """
        if "use_cache" not in self._takes:
            return False
        token = torch.zeros(1, 1, dtype=torch.int64, device=input_device(self._model))
        kept = self._model(token, use_cache=True).values()
        return any(hasattr(value, "reorder_cache") for value in kept)

    def _tell_prompt(self, job: Job, logits: torch.Tensor) -> None:
        prompt = job.request.prompt
        for begin in range(0, len(prompt) - 1, MOST_LOGPROBS):
            following = prompt[begin + 1 : begin + 1 + MOST_LOGPROBS]
            before = logits[begin : begin + len(following)].float()
            tokens = prompt_logprobs(before, following, job.request.prompt_logprobs or 0)
            job.tell_prompt(self._tokenizer.logprobs(tokens))

    def _generate(
        self,
        job: Job,
        chooser: _Chooser,
        prompt: torch.Tensor,
        mask: dict[str, torch.Tensor],
        **options: Any,
    ) -> None:
        # A stopping criterion is asked after each token, before the next one is computed.
        def is_enough(input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
            if not chooser.has_ended and (job.cancelled or self._reception.closed):
                job.stop(FinishReason.FINISH_REASON_CANCELLED)
            self._emit_outputs()
            self._reception.tell_places()
            self._reception.report()
            return torch.full(input_ids.shape[:1], chooser.has_ended, device=input_ids.device)

        self._model.generate(
            prompt,
            logits_processor=LogitsProcessorList([chooser]),
            stopping_criteria=StoppingCriteriaList([is_enough]),
            generation_config=GenerationConfig(
                max_new_tokens=job.request.stopping.max_new_tokens, **_PLAIN_DECODING | options
            ),
            **mask,
        )

    def _emit_outputs(self) -> None:
        if self._outputs:
            self._emit(list(self._outputs))
            self._outputs.clear()
