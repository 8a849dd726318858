"""What to make of a server stream's messages, one by one. No I/O here: both clients use these."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from itertools import chain
from typing import Generic, TypeVar

from loaderd.client import responses
from loaderd.client.errors import UnexpectedAnswerError
from loaderd.client.types import (
    Completion,
    Delta,
    DownloadPlan,
    DownloadProgress,
    Finish,
    GenerationResult,
    GenerationStarted,
    LeaseInfo,
    LoadProgress,
    ModelInfo,
    ModelList,
    Snapshot,
    TokenLogprob,
    VerifyReport,
    VerifyUpdate,
    WatchUpdate,
)
from loaderd.v1 import cache_pb2, generation_pb2, model_pb2

Message = TypeVar("Message")
Item = TypeVar("Item")
Result = TypeVar("Result")


class Receiver(ABC, Generic[Message, Item, Result]):
    """Takes the messages of one stream in order; the last one holds the result."""

    def __init__(self) -> None:
        self._result: Result | None = None

    @abstractmethod
    def take(self, message: Message) -> Item | None:
        """The item that the message brings the caller; None when it brings none."""

    def end(self) -> None:
        """Called when the stream has ended well.

        Raises:
            UnexpectedAnswerError: The result did not come.
        """
        if self._result is None:
            raise UnexpectedAnswerError("the daemon ended the call without a result or an error")

    @property
    def result(self) -> Result:
        """The result, once the stream has ended well.

        Raises:
            RuntimeError: It has not.
        """
        if self._result is None:
            raise RuntimeError("there is no result yet; iterate to the end first")
        return self._result


class LoadReceiver(Receiver[model_pb2.LoadModelResponse, LoadProgress, ModelInfo]):
    """A load: progress, then the model, with a lease if one was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._lease: LeaseInfo | None = None

    @property
    def lease(self) -> LeaseInfo:
        """The lease, once the stream has ended well.

        Raises:
            UnexpectedAnswerError: It did not come.
        """
        if self._lease is None:
            raise UnexpectedAnswerError("the daemon loaded the model and gave no lease")
        return self._lease

    def take(self, message: model_pb2.LoadModelResponse) -> LoadProgress | None:
        """See `Receiver`."""
        match message.WhichOneof("update"):
            case "progress":
                return responses.load_progress(message.progress)
            case "model":
                self._result = responses.model_info(message.model)
                if message.HasField("lease"):
                    self._lease = responses.lease(message.lease)
        return None


class DownloadReceiver(Receiver[cache_pb2.DownloadModelResponse, DownloadProgress, Snapshot]):
    """A download: the plan, progress, then the snapshot."""

    def __init__(self) -> None:
        super().__init__()
        self.plan: DownloadPlan | None = None

    def take(self, message: cache_pb2.DownloadModelResponse) -> DownloadProgress | None:
        """See `Receiver`."""
        match message.WhichOneof("update"):
            case "progress":
                return responses.download_progress(message.progress)
            case "plan":
                self.plan = responses.download_plan(message.plan)
            case "snapshot":
                self._result = responses.snapshot(message.snapshot)
        return None


class VerifyReceiver(Receiver[cache_pb2.VerifySnapshotResponse, VerifyUpdate, VerifyReport]):
    """A verification: progress, problems and the repair's progress, then the report."""

    def take(self, message: cache_pb2.VerifySnapshotResponse) -> VerifyUpdate | None:
        """See `Receiver`."""
        match message.WhichOneof("update"):
            case "progress":
                return responses.verify_progress(message.progress)
            case "problem":
                return responses.file_problem(message.problem)
            case "repair":
                return responses.download_progress(message.repair)
            case "report":
                self._result = responses.verify_report(message.report)
        return None


class WatchReceiver(Receiver[model_pb2.WatchModelsResponse, WatchUpdate, None]):
    """A watch: all models, then events."""

    def take(self, message: model_pb2.WatchModelsResponse) -> WatchUpdate | None:
        """See `Receiver`."""
        match message.WhichOneof("update"):
            case "snapshot":
                return ModelList(tuple(map(responses.model_info, message.snapshot.models)))
            case "event":
                return responses.model_event(message.event)
        return None

    def end(self) -> None:
        """See `Receiver`. A watch has no result: it ends when the daemon shuts down."""


class GenerationReceiver(Receiver[generation_pb2.StreamGenerateResponse, Delta, GenerationResult]):
    """A generation: its place in the queue, what is known at its start, deltas, how it ended."""

    def __init__(self) -> None:
        super().__init__()
        self.queue_position: int | None = None
        self.started: GenerationStarted | None = None
        self._prompt: list[TokenLogprob] = []
        self._deltas: defaultdict[int, list[Delta]] = defaultdict(list)

    def take(self, message: generation_pb2.StreamGenerateResponse) -> Delta | None:
        """See `Receiver`."""
        match message.WhichOneof("event"):
            case "queued":
                self.queue_position = message.queued.position
            case "started":
                self.queue_position = None
                self.started = responses.generation_started(message.started)
            case "prompt_logprobs":
                self._prompt += responses.logprobs(message.prompt_logprobs.logprobs)
            case "delta":
                delta = responses.delta(message.delta)
                self._deltas[delta.index].append(delta)
                return delta
            case "finished":
                self._result = self._put_together(message.finished)
        return None

    def _put_together(self, finished: generation_pb2.GenerationFinished) -> GenerationResult:
        if self.started is None or not finished.finishes:
            raise UnexpectedAnswerError("the daemon's stream lacks its start or its finish")
        return GenerationResult(
            request_id=self.started.request_id,
            model_id=self.started.model_id,
            completions=tuple(
                self._completion(index, responses.finish(finish))
                for index, finish in enumerate(finished.finishes)
            ),
            prompt_logprobs=tuple(self._prompt),
            usage=responses.usage(finished.usage),
            timings=responses.generation_timings(finished.timings),
            seed=finished.seed,
        )

    def _completion(self, index: int, finish: Finish) -> Completion:
        deltas = self._deltas[index]
        return Completion(
            index=index,
            text="".join(delta.text for delta in deltas),
            token_ids=tuple(chain.from_iterable(delta.token_ids for delta in deltas)),
            logprobs=tuple(chain.from_iterable(delta.logprobs for delta in deltas)),
            finish=finish,
        )
